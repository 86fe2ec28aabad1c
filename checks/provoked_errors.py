"""Mistakes of a newcomer, each with the command that makes it: how long until the one line that says so, and
what it says.

    python -m checks.provoked_errors
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS = 2.0  # until the error is there, on an idle machine


@dataclass(frozen=True)
class Mistake:
    """A command line, below a folder that `prepare` has filled, and words that its error holds."""

    command: str
    told: str


MISTAKES = (
    Mistake("serve --target ./models/nothing", "./models/nothing: no such folder"),
    Mistake("serve --target runs/quick/nothing/model", "runs/quick/nothing/model: no such folder"),
    Mistake("serve --target targets/smol", "did you mean targets/small?"),
    Mistake("serve --target nobody/nothing", "nobody/nothing: no such folder, and http"),
    Mistake("serve --target targets/bare", "has no config.json"),
    Mistake("serve --target targets/small", "has no *.safetensors"),
    Mistake("serve --target missing.gguf", "missing.gguf: no such file"),
    Mistake("serve --drafter runs/quick/draftr", "did you mean runs/quick/drafter?"),
    Mistake("serve --drafter runs/quick/drafter", "did you mean runs/quick/drafter/best?"),
    Mistake("serve --drafter other", "is for another target (hidden size 9999"),
    Mistake("serve --device gpu", "--device gpu: is not known"),
    Mistake("serve --device cuda", "there is no GPU here"),
    Mistake("serve --dtype float8", "--dtype is 'float8'"),
    Mistake("serve --kv-gib 500000", "--kv-gib is 500000"),
    Mistake("serve --calibration nothing.json", "--calibration nothing.json: no such file"),
    Mistake("serve --port 99999", "port is 99999"),
    Mistake("serve --draftr x", "--drafter"),
    Mistake("generate -p nothing.jsonl -o out.jsonl", "nothing.jsonl: no such file"),
    Mistake("generate -p broken.jsonl -o out.jsonl", "broken.jsonl:1: is not JSON"),
    Mistake("capture -c nothing.jsonl -o out", "nothing.jsonl: no such file"),
    Mistake("train -f featurs -o out", "did you mean features?"),
    Mistake("train -f features -o out -r tiny-dsprk", "did you mean tiny-dspark?"),
    Mistake(
        "train -f features -o out --set train.learning_rate=1", "train.learning_rate: is not a known key"
    ),
    Mistake("train -f features -o out --set trian.lr=1", "did you mean train?"),
    Mistake("evaluate -d runs/quick/drafter -o out", "did you mean runs/quick/drafter/best?"),
    Mistake("calibrate -d nothing -o out", "nothing: no such folder"),
    Mistake("profile -d nothing -o out.json", "nothing: no such folder"),
    Mistake("simulate --step-rate balancd", "did you mean balanced?"),
    Mistake("export -d nothing -o out", "nothing: no such folder"),
    Mistake("bench --url http://127.0.0.1:9", "is the server up"),
    Mistake("chat --url http://127.0.0.1:9 hello", "is the server up"),
    Mistake("trian", "Did you mean 'train'?"),
    Mistake(
        "capture -c answers.jsonl -o out --taget tiny", "--taget: no such option, did you mean --target?"
    ),
    Mistake("serve --threads zero", "--threads zero: must be a whole number; see "),
    Mistake("serve --kv-gib much", "--kv-gib much: must be a number; see "),
    Mistake("serve --target smollm3", "smollm3: no such folder; did you mean smollm2?"),
    Mistake("serve --target tinny", "tinny: no such folder; did you mean tiny?"),
    Mistake("serve --drafter named", "is for another target (smollm2) (hidden size 9999"),
    Mistake("serve --max-length 1000000", "--max-length is 1000000; tiny allows 2048 at most"),
    Mistake(
        "serve --step-rate features", "--step-rate features: is a folder; give a file of draftkit profile"
    ),
    Mistake("serve --drafter broken.jsonl", "broken.jsonl: is a file; give the folder of a drafter"),
    Mistake("generate -p features -o out.jsonl", "features: is a folder; give a JSONL file of conversations"),
    Mistake("generate -p sets.jsonl -o answers.jsonl", "holds an answer to another prompt of id 'a'"),
    Mistake("capture -c features -o out", "features: is a folder; give a JSONL file of conversations"),
    Mistake("train -f broken.jsonl -o out", "--features broken.jsonl: is a file; give a feature store"),
    Mistake("train -f featurs=0.5 -o out", "did you mean features?"),
    Mistake("train -f other -o out", "--features other: is no feature store"),
    Mistake("train -f features -o out -r other", "other: is a folder and no recipe"),
    Mistake(
        "train -f features -o out --set train.leraning_rate=1",
        "--set train.leraning_rate: is not a known key; did you mean train.lr?",
    ),
    Mistake("train -f features -o out --set train.num_epochs=1", "did you mean train.epochs?"),
    Mistake("train -f features -o out --set lr=1", "lr: is not a known key; did you mean train.lr?"),
    Mistake("evaluate -d broken.jsonl -o out", "broken.jsonl: is a file; give the folder of a drafter"),
    Mistake("evaluate -d runs/quick/drafter/best -o out -p features", "features: is a folder; give a JSONL"),
    Mistake(
        "simulate --traces features", "--traces features: is a folder; give a file of draftkit calibrate"
    ),
    Mistake("simulate --step-rate features", "--step-rate features: is a folder; give a file"),
    Mistake("specialise --traces nothere.jsonl -o out", "nothere.jsonl: no such file; give a file of logs"),
    Mistake("specialise --traces features -o out", "--traces features: is a folder; give a file of logs"),
    Mistake(
        "export -d runs/quick/drafter/best -o out --for vlm", "engine 'vlm' is not known; did you mean vllm?"
    ),
    Mistake(
        "doctor -d runs/quick/drafter/best --engine vlm", "engine 'vlm' is not known; did you mean vllm?"
    ),
    Mistake("report broken.jsonl", "broken.jsonl: is a file; give the folder of a run"),
    Mistake("recipes nosuch", "or one of `draftkit recipes`: deepseek"),
    Mistake("features verify broken.jsonl", "broken.jsonl: is a file; give a feature store"),
    Mistake("serve --target targets/huge", "config.json has num_experts 1,000,000,000, and the 1 tensors"),
    Mistake("generate -o out.jsonl --target targets/huge", "config.json has num_experts 1,000,000,000, and"),
    Mistake("mix features -o out.jsonl", "features: is a folder; give a YAML file of sources"),
    Mistake("mix nothing.yaml -o out.jsonl", "nothing.yaml: no such file; give a YAML file of sources"),
    Mistake("mix broken.jsonl -o features", "--out features is a folder; give the name of a file"),
    Mistake("traces features -o out", "features: is a folder; give a file of logs"),
    Mistake(
        "capture -c sets.jsonl -o broken.jsonl", "--out broken.jsonl is a file; give the name of a folder"
    ),
    Mistake("specialise --traces sets.jsonl -o broken.jsonl", "--out broken.jsonl is a file; give the name"),
    Mistake(
        "specialise --traces sets.jsonl -o out --start-from broken.jsonl",
        "broken.jsonl: is a file; give the folder of a drafter",
    ),
    Mistake("quickstart -o broken.jsonl", "--out broken.jsonl is a file; give the name of a folder"),
    Mistake("plan -c features", "features: is a folder; give a JSONL file of conversations"),
    Mistake(
        "bench --url http://127.0.0.1:9 -p features",
        "--prompts features: is a folder; give a JSONL file of prompts",
    ),
    Mistake("bench --url http://127.0.0.1:9 -p set.jsonl", "did you mean sets.jsonl?"),
    Mistake("serve --step-rate broken.jsonl", "broken.jsonl: is no step-rate table"),
    Mistake("serve --calibration broken.jsonl", "broken.jsonl: is no calibration"),
    Mistake("simulate --step-rate broken.jsonl", "broken.jsonl: is no step-rate table"),
    Mistake("simulate --calibration broken.jsonl", "broken.jsonl: is no calibration"),
    Mistake("push broken.jsonl me/mine", "broken.jsonl: is a file; give the folder of a drafter"),
    Mistake(
        "push runs/quick/drafter/best me/mine --results broken.jsonl",
        "--results broken.jsonl: is a file; give the folder that `draftkit evaluate` wrote",
    ),
    Mistake("push runs/quick/drafter/best me/mine --results nothing", "--results nothing: no such folder"),
    Mistake("suite fetch --from broken.jsonl", "--from broken.jsonl: is a file; give a folder of files such"),
    Mistake("suite fetch --from nothing", "--from nothing: no such folder; give a folder of files such"),
    Mistake(
        "evaluate --suite paper --suite-folder broken.jsonl -d runs/quick/drafter/best -o out",
        "--suite-folder broken.jsonl: is a file; give the folder of `draftkit suite fetch",
    ),
    Mistake(
        "export --for llama.cpp --converter features -d runs/quick/drafter/best -o out --target tiny",
        "--converter features: is a folder; give llama.cpp's convert_hf_to_gguf.py",
    ),
    Mistake(
        "export --for llama.cpp --converter nothing.py -d runs/quick/drafter/best -o out --target tiny",
        "--converter nothing.py: no such file; give llama.cpp's convert_hf_to_gguf.py",
    ),
    Mistake(
        "export --for vllm -d runs/quick/drafter/best -o broken.jsonl --target tiny",
        "--out broken.jsonl is a file; give the name of a folder",
    ),
    Mistake(
        "export --for llama.cpp -d runs/quick/drafter/best -o broken.jsonl --target tiny",
        "--out broken.jsonl is a file; give the name of a folder",
    ),
)


# of another prompt than sets.jsonl's
ANSWER = b'{"id": "a", "asked": "0123456789abcdef", "finish_reason": "stop", "messages": []}\n'


def prepare(folder: Path) -> None:
    """What the commands find: a run, features, two folders that are no whole target, a broken file."""
    for name in ("runs/quick/drafter/best", "features", "targets/bare", "targets/small", "other", "named"):
        (folder / name).mkdir(parents=True)
    (folder / "runs/quick/drafter/best/config.json").write_text("{}")
    (folder / "targets/small/config.json").write_text("{}")
    (folder / "targets/huge").mkdir()
    (folder / "targets/huge/config.json").write_text('{"hidden_size": 2, "num_experts": 1000000000}')
    header = b'{"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "targets/huge/model.safetensors").write_bytes(weights)
    for name in ("other", "named"):
        (folder / name / "config.json").write_text('{"hidden_size": 9999}')
    (folder / "named/draftkit.json").write_text('{"target": "smollm2"}')
    (folder / "features/manifest.json").write_text("{}")
    (folder / "answers.jsonl").write_bytes(ANSWER)
    (folder / "sets.jsonl").write_text('{"id": "a", "prompt": "What is a set?"}\n')
    (folder / "broken.jsonl").write_text('{"prompt": "What is a list?"\n')


def environment(folder: Path) -> dict[str, str]:
    """No GPU, no defaults of the user's, and a hub that nobody answers for."""
    none = {"CUDA_VISIBLE_DEVICES": "", "XDG_CONFIG_HOME": str(folder), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return {**os.environ, **none, "HF_HUB_OFFLINE": "0"}


def provoke(mistake: Mistake, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in the prepared folder."""
    command = [sys.executable, "-m", "draftkit", *mistake.command.split()]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)


def main() -> None:
    """One line per mistake: seconds and what was said; exit code 1 where one is late, or something else."""
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for mistake in MISTAKES:
            began = time.perf_counter()
            done = provoke(mistake, Path(name))
            seconds = time.perf_counter() - began
            right = done.returncode == 2 and mistake.told in done.stderr and seconds < SECONDS
            wrong += not right
            said = done.stderr.strip().splitlines() or [""]
            print(f"{seconds:5.2f} s  {'ok   ' if right else 'WRONG'}  {mistake.command}\n{'':15}{said[-1]}")
    print(f"{len(MISTAKES)} mistakes, {wrong} not told right within {SECONDS:g} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
