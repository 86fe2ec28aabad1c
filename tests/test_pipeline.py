"""Generate, capture and train from files to files: interruptions, damage and mismatches."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit.artefact import sealed
from draftkit.data import capture as capture_module
from draftkit.data.capture import CaptureSettings, capture
from draftkit.data.conversations import Conversation, Message, read_conversations
from draftkit.data.features import FeatureStore, write_shard
from draftkit.data.generate import Answerer, GenerateSettings, answer_in_batches, generate_file
from draftkit.data.template import render_prompt
from draftkit.engine.answers import EngineAnswers, answerer
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError, FeatureStoreError
from draftkit.ops.sampling import Sampling
from draftkit.target.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from draftkit.target.transformers import TransformersTarget
from support.targets import make_family

WORDS = ["list", "value", "holds", "step", "return", "what", "add", "number"]
SETTINGS = GenerateSettings(Sampling(1.0), max_new_tokens=12, batch_size=4, seed=5)


def prompts(count: int = 14) -> list[Conversation]:
    return [
        Conversation(f"p{i}", ["code", "chat"][i % 2], (Message("user", " ".join(WORDS[: 1 + i % 7]) + f" {i}"),))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(target_folder: Path) -> Any:
    return load_tokenizer(str(target_folder))


@pytest.fixture(scope="module", params=["engine", "padded batches"])
def answer_all(target: TransformersTarget, request: pytest.FixtureRequest) -> Answerer:
    return EngineAnswers(target, 4) if request.param == "engine" else partial(answer_in_batches, target)


@pytest.fixture(scope="module")
def answers(
    target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    generate_file(target, tokenizer, prompts(), out, SETTINGS, answer_all)
    return out


def records(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({r["id"] for r in rows}) == len(rows), "a record is there twice"
    return {r["id"]: r for r in rows}


# --- generate


def test_every_prompt_is_answered_once_and_truncation_is_marked(answers: Path, target: TransformersTarget) -> None:
    found = records(answers)
    assert found.keys() == {p.id for p in prompts()}
    for record in found.values():
        assert record["messages"][0]["role"] == "user"
        assert record["finish_reason"] in ("stop", "length", "empty")
        assert (record["completion_tokens"] == 12) or record["finish_reason"] != "length"
    assert {r["finish_reason"] for r in found.values()} >= {"length"}


def test_an_answer_does_not_depend_on_its_batch(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    """In float64, where rounding cannot move a draw: one by one, the same answers."""
    alone = tmp_path / "alone.jsonl"
    generate_file(target, tokenizer, prompts(), alone, replace(SETTINGS, batch_size=1), answer_all)
    assert records(alone) == records(answers)


def test_greedy_answers_are_the_same_by_engine_and_by_padded_batches(target: TransformersTarget, tokenizer: Any) -> None:
    greedy = replace(SETTINGS, sampling=Sampling(0.0))
    tokens = [render_prompt(tokenizer, p.as_dicts()) for p in prompts()]
    seeds = [(0, i) for i in range(len(tokens))]
    assert EngineAnswers(target, 4)(tokens, seeds, greedy) == answer_in_batches(target, tokens, seeds, greedy)


def test_a_family_without_a_lean_forward_is_answered_in_padded_batches(target: TransformersTarget, monkeypatch: Any) -> None:
    monkeypatch.setattr("draftkit.engine.answers.unsupported", lambda _: "another family")
    assert isinstance(answerer(target, 4), partial)
    monkeypatch.undo()
    assert isinstance(answerer(target, 4), EngineAnswers)


def test_padded_batches_hold_no_more_prompts_than_asked_for(target: TransformersTarget, monkeypatch: Any) -> None:
    widths, forward = [], target.forward
    monkeypatch.setattr(target, "forward", lambda tokens_BT, *rest: widths.append(len(tokens_BT)) or forward(tokens_BT, *rest))
    answers = answer_in_batches(target, [(4, 20, 31)] * 10, [(0, i) for i in range(10)], SETTINGS)
    assert len(answers) == 10 and max(widths) == SETTINGS.batch_size


def test_several_turns_are_answered_one_after_the_other(
    target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    turns = Conversation("t", "chat", (Message("user", "add"), Message("user", "return"), Message("user", "list")))
    generate_file(target, tokenizer, [turns], tmp_path / "a.jsonl", replace(SETTINGS, sampling=Sampling(0.0)), answer_all)
    record = records(tmp_path / "a.jsonl")["t"]
    roles = [m["role"] for m in record["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) or record["finish_reason"] != "stop"


def test_a_torn_line_is_made_again(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    torn = tmp_path / "answers.jsonl"
    raw = answers.read_bytes()
    for cut in (1, len(raw) // 3, len(raw) - 1):
        torn.write_bytes(raw[:cut])
        torn.with_suffix(".manifest.json").write_bytes(answers.with_suffix(".manifest.json").read_bytes())
        generate_file(target, tokenizer, prompts(), torn, SETTINGS, answer_all)
        assert records(torn) == records(answers)


def write_beside_manifest(path: Path, text: str, other: Path) -> Path:
    path.write_text(text)
    path.with_suffix(".manifest.json").write_bytes(other.with_suffix(".manifest.json").read_bytes())
    return path


def test_other_settings_are_refused(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer
) -> None:
    with pytest.raises(DataError, match="other settings"):
        generate_file(target, tokenizer, prompts(), answers, replace(SETTINGS, seed=6), answer_all)


def test_answers_to_other_prompts_of_the_same_ids_are_refused(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    before, (first, *rest) = answers.read_text().replace('"length"', '"stop"'), prompts()
    answers = write_beside_manifest(tmp_path / "answers.jsonl", before, answers)
    longer = replace(first, messages=(*first.messages, Message("user", "more")))
    for changed in (replace(first, messages=(Message("user", "another"),)), longer):
        with pytest.raises(DataError, match=rf"answers\.jsonl: holds an answer to another prompt of id '{first.id}'"):
            generate_file(target, tokenizer, [changed, *rest], answers, SETTINGS, answer_all)
    spoken = replace(first, messages=(*first.messages, Message("assistant", "an answer that will be made anew")))
    assert generate_file(target, tokenizer, [spoken, *rest], answers, SETTINGS, answer_all) == len(rest) + 1
    assert answers.read_text() == before


def test_a_cut_answer_stands_for_the_first_turns_of_its_own_prompt_only(
    target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    out, limited = tmp_path / "a.jsonl", replace(SETTINGS, max_new_tokens=1)
    turns = Conversation("t", "chat", (Message("user", "add"), Message("user", "return")))
    generate_file(target, tokenizer, [turns], out, limited, answer_all)
    assert [m["role"] for m in records(out)["t"]["messages"]].count("user") == 1
    assert generate_file(target, tokenizer, [turns], out, limited, answer_all) == 1
    with pytest.raises(DataError, match="another prompt of id 't'"):
        generate_file(target, tokenizer, [replace(turns, messages=turns.messages[::-1])], out, limited, answer_all)


def test_a_prompt_without_room_is_told_and_costs_no_other_answer(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path, capsys: Any
) -> None:
    out, huge = tmp_path / "a.jsonl", Conversation("huge", "chat", (Message("user", "list " * 300),))
    for _ in range(2):  # a run that finds everything done tells it again
        assert generate_file(target, tokenizer, [*prompts(), huge], out, SETTINGS, answer_all) == 15
        assert capsys.readouterr().err.startswith(f"{out}: 1 of 15 prompts leave no room for an answer, 'huge' first")
    found = records(out)
    assert (found["huge"]["finish_reason"], found.pop("huge")["completion_tokens"]) == ("too_long", 0)
    assert found == records(answers)


def test_a_conversation_that_fills_the_context_ends_with_its_last_answer(
    target: TransformersTarget, tokenizer: Any, tmp_path: Path
) -> None:
    info = replace(target.info, stop_token_ids=tuple(range(20, target.info.vocab_size)))  # answers end at once
    stopping = TransformersTarget(target.model, info)
    turns = Conversation("t", "chat", (Message("user", "list " * 60),) * 4)
    generate_file(stopping, tokenizer, [turns], tmp_path / "a.jsonl", SETTINGS, partial(answer_in_batches, stopping))
    record = records(tmp_path / "a.jsonl")["t"]
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 3
    assert record["finish_reason"] == "length"


@pytest.mark.parametrize("made", [EngineAnswers, lambda target, running: partial(answer_in_batches, target)])
def test_a_long_neighbour_does_not_shorten_an_answer(target: TransformersTarget, made: Any) -> None:
    settings = replace(SETTINGS, sampling=Sampling(0.0))
    lengths = [len(a.tokens) for a in made(target, 4)([(4, 20, 31), (7,) * 250, (7,) * 256], [(0, 0)] * 3, settings)]
    assert lengths == [12, 6, 0]


def test_a_row_that_filled_the_context_does_not_end_its_batch() -> None:
    target = make_family("gpt2")  # positions are rows of a table of 256
    tokens, seeds = [(7,) * 250, *[(4, 20, 31)] * 7], [(0, i) for i in range(8)]
    found = answer_in_batches(target, tokens, seeds, replace(SETTINGS, batch_size=8))
    assert len(found[0].tokens) == 6
    assert max(len(a.tokens) for a in found) == 12


def test_an_engine_whose_memory_ends_before_the_context_limits_answers_too(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftkit.engine.answers.EngineSettings", partial(EngineSettings, max_length=40))
    found = EngineAnswers(target, 4)([(7,) * 40, (7,) * 37], [(0, 0)] * 2, replace(SETTINGS, sampling=Sampling(0.0)))
    assert [len(a.tokens) for a in found] == [0, 3]


def test_several_turns_are_answered_under_a_template_that_insists_on_alternating_roles(
    target: TransformersTarget, target_folder: Path, answer_all: Answerer, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role + m.content }}{% endfor %}"
    )
    turns = Conversation("t", "chat", (Message("user", "add"), Message("user", "return")))
    assert generate_file(target, tokenizer, [turns], tmp_path / "a.jsonl", SETTINGS, answer_all) == 1


def test_a_second_run_is_kept_out_while_the_first_one_writes(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(DataError, match=r"a\.jsonl: another run is writing it"):
            generate_file(target, tokenizer, prompts(), out, SETTINGS, answer_all)
        return answer_all(*arguments)

    for answer in (meanwhile, answer_all):  # when it has ended, another one may
        generate_file(target, tokenizer, prompts(), out, SETTINGS, answer)
        assert records(out) == records(answers)


def test_a_file_that_holds_answers_twice_is_refused(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    lines = answers.read_text().splitlines(keepends=True)
    out = write_beside_manifest(tmp_path / "a.jsonl", "".join([*lines, *lines[3:5]]), answers)
    with pytest.raises(DataError, match=rf"holds 2 answers twice, '{json.loads(lines[3])['id']}' first"):
        generate_file(target, tokenizer, prompts(), out, SETTINGS, answer_all)


def test_another_template_or_other_stop_tokens_are_refused(
    answers: Path, target: TransformersTarget, target_folder: Path, answer_all: Answerer
) -> None:
    for change, what in (
        (lambda t: setattr(t, "chat_template", t.chat_template + " "), "another chat template"),
        (lambda t: t.add_tokens("<new>"), "another tokenizer"),
    ):
        tokenizer = load_tokenizer(str(target_folder))
        change(tokenizer)
        with pytest.raises(DataError, match=f"was begun with {what}; choose another file"):
            generate_file(target, tokenizer, prompts(), answers, SETTINGS, answer_all)
    stopping = TransformersTarget(target.model, replace(target.info, stop_token_ids=(2, 5)))
    with pytest.raises(DataError, match="was begun with other stop tokens"):
        generate_file(stopping, load_tokenizer(str(target_folder)), prompts(), answers, SETTINGS, answer_all)


def test_a_file_that_generate_did_not_write_is_left_alone(
    answers: Path, target: TransformersTarget, tokenizer: Any, answer_all: Answerer, tmp_path: Path
) -> None:
    out, manifest = tmp_path / "mine.jsonl", tmp_path / "mine.manifest.json"
    out.write_bytes(answers.read_bytes())
    with pytest.raises(DataError, match=rf"^{out}: is there, and no mine\.manifest\.json"):
        generate_file(target, tokenizer, prompts(), out, SETTINGS, answer_all)
    for damaged in ("{", "[1]", "3"):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match=rf"^{manifest}: is damaged"):
            generate_file(target, tokenizer, prompts(), out, SETTINGS, answer_all)
    assert out.read_bytes() == answers.read_bytes()


def command(target_folder: Path, *arguments: str) -> list[str]:
    settings = [f"target.path={target_folder}", "drafter.num_features=2", "generate.max_new_tokens=40", "generate.batch_size=2"]
    settings += ["train.epochs=100000", "train.validate_every=5", "drafter.num_layers=1"]
    return [sys.executable, "-m", "draftkit.cli", *arguments, *(x for s in settings for x in ("--set", s))]


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"id": p.id, "domain": p.domain, "messages": p.as_dicts()} for p in prompts(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


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
    """A real process, killed again and again the moment it has written something, ends with what one run gives."""
    source = write_prompts(tmp_path / "prompts.jsonl", 40)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    arguments = ["generate", "-p", str(source), "-o"]
    assert subprocess.run(command(target_folder, *arguments, str(whole)), capture_output=True).returncode == 0
    code, _ = run_until(command(target_folder, *arguments, str(killed)), lambda: has_content(killed), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 0 < len(killed.read_bytes().splitlines()) < 40, "it was killed in the middle"
    assert subprocess.run(command(target_folder, *arguments, str(killed)), capture_output=True).returncode == 0
    assert records(killed) == records(whole)


@pytest.mark.slow
def test_signals_end_every_stage_in_order_and_it_goes_on(target_folder: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM in turn."""
    source = write_prompts(tmp_path / "prompts.jsonl", 1500)
    generated, features, drafter = tmp_path / "answers.jsonl", tmp_path / "features", tmp_path / "drafter"
    generate = command(target_folder, "generate", "-p", str(source), "-o", str(generated))
    ended = run_until(generate, lambda: has_content(generated), signal.SIGINT)
    assert ended[0] == 130, ended[1]
    assert ended[1].splitlines()[-1] == "error: interrupted; run the same command again to go on"
    small = write_prompts(tmp_path / "small.jsonl", 8)
    done = subprocess.run(command(target_folder, "generate", "-p", str(small), "-o", str(tmp_path / "a.jsonl")), check=True)
    assert done.returncode == 0
    long = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["messages"][-1]["role"] == "assistant"]
    long.write_text("".join(json.dumps(r | {"id": f"{r['id']}-{i}"}) + "\n" for i in range(400) for r in rows))
    reading = command(target_folder, "capture", "-c", str(long), "-o", str(features))
    ended = run_until(reading, lambda: has_content(features / "shard-00000.safetensors"), signal.SIGTERM)
    assert ended[0] == 143, ended[1]
    stop = subprocess.run(command(target_folder, "capture", "-c", str(tmp_path / "a.jsonl"), "-o", str(features)))
    assert stop.returncode == 2, "a store of other conversations is not mixed in"
    subprocess.run(command(target_folder, "capture", "-c", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "f")), check=True)
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
    target: TransformersTarget, tokenizer: Any, answers: Path, out: Path, layers: tuple[int, ...] = (0, 2)
) -> FeatureStore:
    settings = CaptureSettings(layers, dtype="float32", batch_tokens=64)
    capture(target, tokenizer, read_conversations([answers]), out, settings)
    return FeatureStore(out)


def test_a_store_holds_what_the_target_thinks(
    target: TransformersTarget, tokenizer: Any, answers: Path, tmp_path: Path
) -> None:
    store = make_store(target, tokenizer, answers, tmp_path)
    assert len(store) == sum(r["messages"][-1]["role"] == "assistant" for r in records(answers).values())
    for i in range(len(store)):
        sample = store[i]
        alone = target.forward(sample.tokens_T[None], None, (0, 2))
        torch.testing.assert_close(sample.features_TF, alone.features_BTF[0].float(), atol=1e-4, rtol=1e-4)  # type: ignore[index]
        torch.testing.assert_close(sample.last_hidden_TH, alone.last_hidden_BTH[0].float(), atol=1e-4, rtol=1e-4)
        assert sample.loss_mask_T.any()
        assert not sample.loss_mask_T[0]


def test_what_a_template_rewrites_is_left_out_and_counted(
    target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content.replace('bad', 'good') }}{% endfor %}"
    told = [Conversation(a, "chat", (Message("user", "add"), Message("assistant", a))) for a in ("bad", "step")]
    settings = CaptureSettings((0, 2), dtype="float32")
    report = capture(target, tokenizer, told, tmp_path / "features", settings)
    assert (report.conversations, report.rewritten) == (1, 1)
    assert FeatureStore(tmp_path / "features")[0].id == "step"
    with pytest.raises(FeatureStoreError, match=r"none of 1 conversations .* 1 rewritten by the chat template"):
        capture(target, tokenizer, told[:1], tmp_path / "none", settings)


def test_capture_goes_on_after_the_last_whole_shard(
    target: TransformersTarget, tokenizer: Any, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "SHARD_CONVERSATIONS", 4)
    whole = make_store(target, tokenizer, answers, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_two(count: int) -> None:
        stop_after_two.calls += 1  # type: ignore[attr-defined]
        if stop_after_two.calls == 2:  # type: ignore[attr-defined]
            raise Stop

    stop_after_two.calls = 0  # type: ignore[attr-defined]
    settings = CaptureSettings((0, 2), dtype="float32", batch_tokens=64)
    read = read_conversations([answers])
    with pytest.raises(Stop):
        capture(target, tokenizer, read, tmp_path / "parts", settings, stop_after_two)
    told = rf"parts: holds 8 of {len(whole)} conversations; run the same `draftkit capture`"
    with pytest.raises(FeatureStoreError, match=told):
        FeatureStore(tmp_path / "parts")
    kept = (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns
    parts = make_store(target, tokenizer, answers, tmp_path / "parts")
    assert (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert parts.manifest == whole.manifest, "the same shards with the same checksums"


def test_damage_and_mismatch_are_named(target: TransformersTarget, tokenizer: Any, answers: Path, tmp_path: Path) -> None:
    store = make_store(target, tokenizer, answers, tmp_path)
    layers, template, tokens = (0, 2), template_hash(tokenizer), tokenizer_hash(tokenizer)
    store.check_matches(target.info.fingerprint, layers, template, tokens)
    for changed, word in (
        (("other", layers, template, tokens), "target"),
        ((target.info.fingerprint, (0, 1), template, tokens), "feature layers"),
        ((target.info.fingerprint, layers, "other", tokens), "chat template"),
        ((target.info.fingerprint, layers, template, "other"), "tokenizer"),
    ):
        with pytest.raises(FeatureStoreError, match=f"another {word}"):
            store.check_matches(*changed)
    with pytest.raises(FeatureStoreError, match="other feature layers"):
        make_store(target, tokenizer, answers, tmp_path, (1, 2))
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
    target: TransformersTarget, tokenizer: Any, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 300 * 2**20})
    monkeypatch.setattr(capture_module, "SPARE_BYTES", 300 * 2**20 - 1000)
    monkeypatch.setattr(capture_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FeatureStoreError, match=r"GiB are needed, 0\.00 GiB are free"):
        make_store(target, tokenizer, answers, tmp_path)
    assert not list(tmp_path.glob("shard-*"))
