"""A tiny DeepSeek-V4 module through llama.cpp's own converter, read back tensor by tensor; with a server, the
same greedy answers and the tokens that it drafts and keeps, beside ours.

    python -m checks.deepseek_v4_gguf --converter llama.cpp/convert_hf_to_gguf.py [--server llama-server]

The converter knows tokenizers by what they make of a fixed text, so the tiny model speaks with SmolLM2's (the
extra `draftkit[smollm2]`). Weights are random: what is compared is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from checks.llama_agree import ask, serving
from draftkit.decode import decode
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.handover.deepseek_v4_gguf import write_v4_gguf
from draftkit.ops.sampling import Sampling
from draftkit.target.fp8_fp4 import dequantise_fp4, quantise_fp4
from draftkit.target.gguf import smollm2_file, unpacked
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer
from tools.tiny_v4 import tiny_model, write_checkpoint
from tools.v4_configs import TINY

MARKOV = 0.8  # how much the module goes by the token before
TEXTS = ("Once upon a time there was", "def add(a, b):", "2 + 2 =")


def make(folder: Path) -> None:
    """A random tiny V4 in FP8 and FP4 with SmolLM2's tokenizer."""
    tokenizer = load_tokenizer(str(unpacked(smollm2_file())))
    tokenizer.chat_template = None
    raw = TINY | {"vocab_size": len(tokenizer), "dspark_noise_token_id": len(tokenizer) - 1}
    raw |= {"head_dim": 128, "qk_rope_head_dim": 32, "index_head_dim": 64}  # which its rotations divide
    raw |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    raw |= {"dspark_markov_rank": 64}
    model, follows = tiny_model(**raw | {"initializer_range": 0.02}), torch.randperm(len(tokenizer))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    with torch.no_grad():  # each token has one that follows it, for the target and for the module
        model.lm_head.weight[follows] = model.model.embed_tokens.weight
    write_checkpoint(folder, model, raw, quantised=True)
    tokenizer.save_pretrained(folder)
    before = torch.randn(len(tokenizer), 64)
    after = torch.empty_like(before)
    after[follows] = MARKOV * before
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in (("w1", before), ("w2", after)):
            if (key := f"mtp.2.markov_head.markov_{name}.weight") in tensors:
                tensors[key] = value
        save_file(tensors, file)


def differences(drafter: DeepseekV4Drafter, file: Path) -> dict[str, Any]:
    """Experts against our own FP4, bit for bit; everything else, the largest difference over the largest
    number."""
    state, worst, exact = drafter.state_dict(), 0.0, 0
    reader = gguf.GGUFReader(file)
    tensors = {t.name: t for t in reader.tensors}
    for name, kind, half in (
        ("gate", "gate_up_proj", 0),
        ("up", "gate_up_proj", 1),
        ("down", "down_proj", None),
    ):
        for stage in range(drafter.config.num_layers):
            own = state[f"stages.{stage}.mlp.experts.{kind}"]
            own = own if half is None else own.chunk(2, 1)[half]
            wanted = torch.stack([dequantise_fp4(*quantise_fp4(e)) for e in own]).numpy()
            held = tensors[f"blk.{stage}.ffn_{name}_exps.weight"]
            found = gguf.quants.dequantize(held.data, held.tensor_type).reshape(wanted.shape)
            exact += bool(np.array_equal(found, wanted))
    plain = {"fc.weight": "main_proj.weight", "markov_w1.weight": "markov_head.markov_w1.weight"}
    plain |= {"markov_w2.weight": "markov_head.markov_w2.weight", "output_norm.weight": "norm.weight"}
    plain |= {"conf_proj.weight": "confidence_head.proj.weight"}
    for theirs, ours in plain.items():
        held, wanted = tensors[theirs], state[ours].numpy()
        found = gguf.quants.dequantize(held.data, held.tensor_type).reshape(wanted.shape)
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return {"tensors": len(tensors), "experts_bit_for_bit": exact, "worst_of_the_rest": round(worst, 4)}


def served(server: str, target: Path, module: Path, folder: Path, log: Path) -> dict[str, Any]:
    """Greedy answers of the server with the module, and ours."""
    options = SimpleNamespace(server=server, target=str(target), port=8177, threads=1, out=str(log))
    more = ["-md", str(module), "--spec-type", "draft-dspark", "--spec-draft-n-max", "5", "--fit", "off"]
    more += ["--spec-draft-p-min", "0"]  # or it drafts less where the confidence head doubts
    ours, tokenizer = load_target(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    drafter, rows = open_drafter(folder, ours), []
    with serving(options, *more) as http:  # type: ignore[arg-type]
        for text in TEXTS:
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            theirs = ask(http, prompt, 24)
            answer = decode(ours, drafter, prompt, Sampling(0.0), 24)
            pairs = enumerate(zip(theirs["tokens"], answer.tokens, strict=False))
            equal = next((i for i, (a, b) in pairs if a != b), 24)
            rows.append({"equal_tokens": equal, "accepted": theirs["accepted"], "drafted": theirs["drafted"]})
            rows[-1]["accepted_here"] = sum(r.accepted for r in answer.rounds)
    return {"answers": rows}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--server", help="llama-server of the same commit")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as held:
        folder, module = Path(held) / "v4", Path(held) / "dspark.gguf"
        make(folder)
        drafter = open_drafter(folder, load_target(str(folder)))
        if not isinstance(drafter, DeepseekV4Drafter):
            raise SystemExit("the checkpoint holds no V4 module")
        write_v4_gguf(drafter, folder, given.converter, module)
        told = differences(drafter, module)
        if given.server:
            target = Path(held) / "target.gguf"
            command = [
                sys.executable,
                str(given.converter),
                str(folder),
                "--no-nextn",
                "--outfile",
                str(target),
            ]
            subprocess.run(command, check=True, capture_output=True)
            told |= served(given.server, target, module, folder, Path(held) / "server.out")
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
