"""Generate, capture and train from files to files: interruptions, damage and mismatches."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from draftkit.artefact import sealed
from draftkit.data import capture as capture_module
from draftkit.data.capture import capture
from draftkit.data.conversations import read_conversations
from draftkit.data.features import FeatureStore, write_shard
from draftkit.data.generate import generate_file
from draftkit.data.messages import Conversation, Message
from draftkit.data.records import made_with
from draftkit.engine.answers import EngineAnswers
from draftkit.errors import FeatureStoreError
from draftkit.settings import CaptureSettings, GenerateSettings
from draftkit.target.prompt_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from draftkit.target.transformers import TransformersTarget
from support.records import prompts, records

SETTINGS = GenerateSettings(max_new_tokens=12, batch_size=4, seed=5)


@pytest.fixture(scope="module")
def shown(target_folder: Path) -> TemplateFormat:
    return TemplateFormat(load_tokenizer(str(target_folder)))


@pytest.fixture(scope="module")
def answers(
    target: TransformersTarget, shown: TemplateFormat, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    about = made_with(shown, target.info.fingerprint, target.info.stop_token_ids, SETTINGS)
    generate_file(EngineAnswers(target, 4), shown, lambda first: prompts()[first:], out, SETTINGS, about)
    return out


def command(target_folder: Path, *arguments: str) -> list[str]:
    settings = [
        f"target.path={target_folder}",
        "drafter.num_features=2",
        "generate.max_new_tokens=40",
        "generate.batch_size=2",
    ]
    settings += ["train.epochs=100000", "train.validate_every=5", "drafter.num_layers=1"]
    return [sys.executable, "-m", "draftkit.cli", *arguments, *(x for s in settings for x in ("--set", s))]


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"id": p.id, "domain": p.domain, "messages": p.as_dicts()} for p in prompts(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def parts_have_content(out: Path) -> bool:
    return any(has_content(p) for p in out.with_name(out.name + ".parts").glob("*.jsonl"))


def steps_done(drafter: Path) -> int:
    """The step of the saved state; 0 while there is none (or while it is being swapped)."""
    try:
        return int(json.loads((drafter / "state" / "position.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def run_until(arguments: list[str], ready: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start a process, send the signal as soon as `ready()`; (exit code, standard error)."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.slow
def test_generate_survives_sigkill_with_the_same_records(target_folder: Path, tmp_path: Path) -> None:
    """A real process, killed again and again the moment it has written something, ends with what one run
    gives."""
    source = write_prompts(tmp_path / "prompts.jsonl", 40)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    arguments = ["generate", "-p", str(source), "-o"]
    assert subprocess.run(command(target_folder, *arguments, str(whole)), capture_output=True).returncode == 0
    code, _ = run_until(
        command(target_folder, *arguments, str(killed)), lambda: parts_have_content(killed), signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    left = sum(
        len(p.read_bytes().splitlines()) for p in killed.with_name("killed.jsonl.parts").glob("*.jsonl")
    )
    assert 0 < left < 40, "it was killed in the middle"
    assert (
        subprocess.run(command(target_folder, *arguments, str(killed)), capture_output=True).returncode == 0
    )
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_signals_end_every_stage_in_order_and_it_goes_on(target_folder: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM in turn."""
    source = write_prompts(tmp_path / "prompts.jsonl", 1500)
    generated, features, drafter = tmp_path / "answers.jsonl", tmp_path / "features", tmp_path / "drafter"
    generate = command(target_folder, "generate", "-p", str(source), "-o", str(generated))
    ended = run_until(generate, lambda: parts_have_content(generated), signal.SIGINT)
    assert ended[0] == 130, ended[1]
    assert ended[1].splitlines()[-1] == "error: interrupted; run the same command again to go on"
    small = write_prompts(tmp_path / "small.jsonl", 8)
    done = subprocess.run(
        command(target_folder, "generate", "-p", str(small), "-o", str(tmp_path / "a.jsonl")), check=True
    )
    assert done.returncode == 0
    long = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["messages"][-1]["role"] == "assistant"]
    for row in rows:
        del row["record_digest"]  # they get other ids
    long.write_text(
        "".join(json.dumps(r | {"id": f"{r['id']}-{i}"}) + "\n" for i in range(400) for r in rows)
    )
    reading = command(target_folder, "capture", "-c", str(long), "-o", str(features))
    ended = run_until(reading, lambda: has_content(features / "shard-00000.safetensors"), signal.SIGTERM)
    assert ended[0] == 143, ended[1]
    stop = subprocess.run(
        command(target_folder, "capture", "-c", str(tmp_path / "a.jsonl"), "-o", str(features))
    )
    assert stop.returncode == 2, "a store of other conversations is not mixed in"
    subprocess.run(
        command(target_folder, "capture", "-c", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "f")),
        check=True,
    )
    train = command(target_folder, "train", "-f", str(tmp_path / "f"), "-o", str(drafter))
    ended = run_until(train, lambda: steps_done(drafter) >= 1, signal.SIGINT)
    assert ended[0] == 130, ended[1]
    before = steps_done(drafter)
    ended = run_until(train, lambda: steps_done(drafter) > before, signal.SIGTERM)
    assert ended[0] == 143, ended[1]
    assert steps_done(drafter) > before, "it went on, not back"
    assert (drafter / "best" / "config.json").exists()


# --- capture and the feature store


def make_store(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    out: Path,
    layers: tuple[int, ...] = (0, 2),
) -> FeatureStore:
    settings = CaptureSettings(dtype="float32", batch_tokens=64)
    capture(target, shown, read_conversations([answers]), out, layers, settings)
    return FeatureStore(out)


def test_a_store_holds_what_the_target_thinks(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    store = make_store(target, shown, answers, tmp_path)
    assert len(store) == len(records(answers))
    for i in range(len(store)):
        sample = store[i]
        alone = target.forward(sample.tokens_T[None], None, (0, 2))
        torch.testing.assert_close(sample.features_TF, alone.features_BTF[0].float(), atol=1e-4, rtol=1e-4)  # type: ignore[index]
        torch.testing.assert_close(
            sample.last_hidden_TH, alone.last_hidden_BTH[0].float(), atol=1e-4, rtol=1e-4
        )
        [turn] = records(answers)[sample.id]["answers"]
        assert sample.tokens_T.tolist() == turn["prompt_ids"] + turn["answer_ids"], (
            "nothing was tokenised again"
        )
        assert sample.loss_mask_T.tolist() == [False] * len(turn["prompt_ids"]) + [True] * len(
            turn["answer_ids"]
        )


def test_what_a_template_rewrites_is_left_out_and_counted(
    target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content == 'bad' else m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    told = [
        Conversation(a, "chat", (Message("user", "add"), Message("assistant", a))) for a in ("bad", "step")
    ]
    settings = CaptureSettings(dtype="float32")
    report = capture(target, TemplateFormat(tokenizer), told, tmp_path / "features", (0, 2), settings)
    assert (report.samples, report.counts.rewritten) == (1, 1)
    assert FeatureStore(tmp_path / "features")[0].id == "step"
    with pytest.raises(
        FeatureStoreError, match=r"none of 1 conversations .* 1 rewritten by the chat template"
    ):
        capture(target, TemplateFormat(tokenizer), told[:1], tmp_path / "none", (0, 2), settings)


def test_capture_goes_on_after_the_last_whole_shard(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture_module, "SHARD_SAMPLES", 4)
    whole = make_store(target, shown, answers, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_two(done: int, total: int) -> None:
        stop_after_two.calls += 1  # type: ignore[attr-defined]
        if stop_after_two.calls == 2:  # type: ignore[attr-defined]
            raise Stop

    stop_after_two.calls = 0  # type: ignore[attr-defined]
    settings = CaptureSettings(dtype="float32", batch_tokens=64)
    read = read_conversations([answers])
    with pytest.raises(Stop):
        capture(target, shown, read, tmp_path / "parts", (0, 2), settings, stop_after_two)
    told = rf"parts: holds 8 of {len(whole)} conversations; run the same `draftkit capture`"
    with pytest.raises(FeatureStoreError, match=told):
        FeatureStore(tmp_path / "parts")
    kept = (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns
    parts = make_store(target, shown, answers, tmp_path / "parts")
    assert (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert parts.manifest == whole.manifest, "the same shards with the same checksums"


def test_damage_and_mismatch_are_named(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    store = make_store(target, shown, answers, tmp_path)
    layers, template, tokens = (0, 2), template_hash(shown.tokenizer), tokenizer_hash(shown.tokenizer)
    store.check_matches(target.info.fingerprint, layers, template, tokens, {})
    for changed, word in (
        (("other", layers, template, tokens, {}), "target"),
        ((target.info.fingerprint, (0, 1), template, tokens, {}), "feature layers"),
        ((target.info.fingerprint, layers, "other", tokens, {}), "chat template"),
        ((target.info.fingerprint, layers, template, "other", {}), "tokenizer"),
        (
            (target.info.fingerprint, layers, template, tokens, {"enable_thinking": False}),
            "set of template switches",
        ),
    ):
        with pytest.raises(FeatureStoreError, match=f"another {word}"):
            store.check_matches(*changed)
    with pytest.raises(FeatureStoreError, match="other feature layers"):
        make_store(target, shown, answers, tmp_path, (1, 2))
    shard = tmp_path / "shard-00000.safetensors"
    intact = shard.read_bytes()
    raw = bytearray(intact)
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(FeatureStoreError, match=r"shard-00000\.safetensors: is damaged"):
        FeatureStore(tmp_path)[0]
    shard.write_bytes(raw[:-5])
    with pytest.raises(FeatureStoreError, match=r"shard-00000\.safetensors: has \d+ of \d+ bytes"):
        FeatureStore(tmp_path)
    shard.write_bytes(intact)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for key, value in (("length", 10**6), ("start", -1), ("length", 0)):
        broken = json.loads(json.dumps(manifest))
        broken["shards"][0]["samples"][0][key] = value
        (tmp_path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(FeatureStoreError, match=r"manifest\.json: is damaged \(another digest"):
            FeatureStore(tmp_path)
        (tmp_path / "manifest.json").write_text(json.dumps(sealed(broken)))
        with pytest.raises(FeatureStoreError, match=r"manifest\.json: is damaged \(.*shard"):
            FeatureStore(tmp_path)[0]
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FeatureStoreError, match=r"manifest\.json: is damaged"):
        FeatureStore(tmp_path)
    with pytest.raises(FeatureStoreError, match="holds no feature store"):
        FeatureStore(tmp_path / "nothing")


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond this fails
    try:
        with pytest.raises(OSError, match=r"shard\.partial: cannot be written \(.*\); make room") as error:
            write_shard(tmp_path, "shard", {"tokens": torch.zeros(10_000)}, ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_noticed_before_capture_begins(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type("Usage", (), {"free": 300 * 2**20})
    monkeypatch.setattr(capture_module, "SPARE_BYTES", 300 * 2**20 - 1000)
    monkeypatch.setattr(capture_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FeatureStoreError, match=r"GiB are needed, 0\.00 GiB are free"):
        make_store(target, shown, answers, tmp_path)
    assert not list(tmp_path.glob("shard-*"))
