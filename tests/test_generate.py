"""Generation: every prompt answered once, token by token as the target wrote it, whatever happens to the
process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftkit.data.answers import Answers
from draftkit.data.conversations import read_conversations
from draftkit.data.generate import GenerateReport, generate_file
from draftkit.data.messages import Conversation, Message
from draftkit.data.padded_answers import PaddedAnswers
from draftkit.data.records import made_with, manifest_path
from draftkit.engine.answers import EngineAnswers, answerer
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError
from draftkit.settings import GenerateSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.records import prompts, records
from support.targets import make_family

SETTINGS = GenerateSettings(max_new_tokens=12, batch_size=4, seed=5)


def generate(
    target: TransformersTarget,
    shown: TemplateFormat,
    asked: Iterable[Conversation],
    out: Path,
    settings: GenerateSettings,
    answers: Answers,
) -> GenerateReport:
    listed = list(asked)
    about = made_with(shown, target.info.fingerprint, target.info.stop_token_ids, settings)
    return generate_file(answers, shown, lambda first: listed[first:], out, settings, about)


@pytest.fixture(scope="module")
def shown(target_folder: Path) -> TemplateFormat:
    return TemplateFormat(load_tokenizer(str(target_folder)))


@pytest.fixture(scope="module", params=["engine", "padded batches"])
def answer_all(target: TransformersTarget, request: pytest.FixtureRequest) -> Answers:
    return EngineAnswers(target, 4) if request.param == "engine" else PaddedAnswers(target, 4)


@pytest.fixture(scope="module")
def answers(
    target: TransformersTarget,
    shown: TemplateFormat,
    answer_all: Answers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    generate(target, shown, prompts(), out, SETTINGS, answer_all)
    return out


def copy_records(text: bytes, path: Path, source: Path) -> Path:
    path.write_bytes(text)
    manifest_path(path).write_bytes(manifest_path(source).read_bytes())
    return path


def test_every_prompt_is_answered_once_with_the_very_tokens(
    answers: Path, target: TransformersTarget, shown: Any
) -> None:
    found = records(answers)
    assert list(found) == sorted(p.id for p in prompts())
    for prompt in prompts():
        record = found[prompt.id]
        [turn] = record["answers"]
        assert tuple(turn["prompt_ids"]) == shown.prompt(prompt.as_dicts())
        assert len(turn["answer_ids"]) == record["completion_tokens"]
        assert (turn["answer_ids"][-1] in target.info.stop_token_ids) == (turn["finish_reason"] == "stop")
        assert record["completion_tokens"] == 12 or turn["finish_reason"] == "stop"
    assert {r["finish_reason"] for r in found.values()} >= {"length"}
    [record] = [c for c in read_conversations([answers]) if c.id == "p3"]
    assert record.turns[0].answer_ids == tuple(found["p3"]["answers"][0]["answer_ids"])


def test_an_answer_depends_on_neither_its_neighbours_nor_the_order(
    answers: Path, target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    """In float64, where rounding cannot move a draw: in another order, twice as many prompts, the same
    answers."""
    more = [replace(p, id=f"{p.id}+") for p in prompts()] + prompts()[::-1]
    generate(target, shown, more, tmp_path / "alone.jsonl", SETTINGS, answer_all)
    found = records(tmp_path / "alone.jsonl")
    assert {k: v for k, v in found.items() if not k.endswith("+")} == records(answers)


def test_greedy_answers_are_the_same_by_engine_and_by_padded_batches(
    target: TransformersTarget, shown: Any
) -> None:
    greedy = replace(SETTINGS, temperature=0.0)
    tokens = [shown.prompt(p.as_dicts()) for p in prompts()]
    seeds = [(0, i) for i in range(len(tokens))]
    assert EngineAnswers(target, 4)(tokens, seeds, greedy) == PaddedAnswers(target, 4)(tokens, seeds, greedy)


def test_a_family_without_a_lean_forward_is_answered_in_padded_batches(
    target: TransformersTarget, monkeypatch: Any
) -> None:
    monkeypatch.setattr("draftkit.engine.answers.unsupported", lambda _: "another family")
    assert isinstance(answerer(target, 4), PaddedAnswers)
    monkeypatch.undo()
    assert isinstance(answerer(target, 4), EngineAnswers)


def test_the_stream_never_drains(target: TransformersTarget, shown: TemplateFormat, tmp_path: Path) -> None:
    """As soon as an answer is finished the next question is in, as long as there are any."""
    answers, filled = EngineAnswers(target, 4), []
    finished = answers.finished

    def noted() -> Any:
        filled.append(4 - answers.room)
        return finished()

    answers.finished = noted  # type: ignore[method-assign]
    generate(target, shown, prompts(40), tmp_path / "a.jsonl", SETTINGS, answers)
    assert set(filled[: len(filled) - 4]) == {4}


def test_padded_batches_hold_no_more_prompts_than_asked_for(
    target: TransformersTarget, monkeypatch: Any
) -> None:
    widths, forward = [], target.forward
    monkeypatch.setattr(
        target, "forward", lambda tokens_BT, *rest: widths.append(len(tokens_BT)) or forward(tokens_BT, *rest)
    )
    answers = PaddedAnswers(target, 4)([(4, 20, 31)] * 10, [(0, i) for i in range(10)], SETTINGS)
    assert len(answers) == 10 and max(widths) == 4


def test_several_turns_are_answered_one_after_the_other(
    target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    turns = Conversation(
        "t", "chat", (Message("user", "add"), Message("user", "return"), Message("user", "list"))
    )
    generate(target, shown, [turns], tmp_path / "a.jsonl", replace(SETTINGS, temperature=0.0), answer_all)
    record = records(tmp_path / "a.jsonl")["t"]
    roles = [m["role"] for m in record["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) or record["finish_reason"] != "stop"
    for number, turn in enumerate(record["answers"]):
        context = record["messages"][: 2 * number + 1]
        assert tuple(turn["prompt_ids"]) == shown.prompt(context)


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_tool_results_keep_the_recorded_history_and_every_turn_is_answered_where_it_stood(
    target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    said = (
        Message("user", "add"),
        Message("assistant", "a call", tool_calls=(CALL,)),
        Message("tool", "return"),
        Message("assistant", "list"),
        Message("user", "more"),
        Message("assistant", "gone"),
    )
    generate(target, shown, [Conversation("t", "chat", said)], tmp_path / "a.jsonl", SETTINGS, answer_all)
    record = records(tmp_path / "a.jsonl")["t"]
    history = [m.as_dict() for m in said[:5]]
    assert record["messages"] == history
    wanted = [shown.prompt(history[:1]), shown.prompt(history[:3]), shown.prompt(history[:5])]
    assert [tuple(t["prompt_ids"]) for t in record["answers"]] == wanted
    assert all(t["message"]["role"] == "assistant" and t["answer_ids"] for t in record["answers"])


def test_a_torn_line_is_made_again(
    answers: Path, target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    raw = answers.read_bytes()
    for cut in (1, len(raw) // 3, len(raw) - 1):
        torn = copy_records(raw[:cut], tmp_path / "answers.jsonl", answers)
        generate(target, shown, prompts(), torn, SETTINGS, answer_all)
        assert records(torn) == records(answers)


def test_other_settings_are_refused(
    answers: Path, target: TransformersTarget, shown: Any, answer_all: Answers
) -> None:
    with pytest.raises(DataError, match="other settings"):
        generate(target, shown, prompts(), answers, replace(SETTINGS, seed=6), answer_all)
    assert (
        generate(target, shown, prompts(), answers, replace(SETTINGS, batch_size=2), answer_all).answered_here
        == 0
    )


def test_answers_to_other_prompts_of_the_same_ids_are_refused(
    answers: Path, target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    before, (first, *rest) = answers.read_bytes(), prompts()
    answers = copy_records(before, tmp_path / "answers.jsonl", answers)
    longer = replace(first, messages=(*first.messages, Message("user", "more")))
    for changed in (
        replace(first, messages=(Message("user", "another"),)),
        longer,
        replace(first, tools=({"function": {}},)),
    ):
        with pytest.raises(
            DataError, match=rf"answers\.jsonl: holds an answer to another prompt of id '{first.id}'"
        ):
            generate(target, shown, [changed, *rest], answers, SETTINGS, answer_all)
    spoken = replace(
        first, messages=(*first.messages, Message("assistant", "an answer that will be made anew"))
    )
    assert generate(target, shown, [spoken, *rest], answers, SETTINGS, answer_all).records == len(rest) + 1
    assert answers.read_bytes() == before


def test_a_prompt_without_room_is_told_and_costs_no_other_answer(
    answers: Path, target: TransformersTarget, shown: Any, answer_all: Answers, tmp_path: Path, capsys: Any
) -> None:
    out, huge = tmp_path / "a.jsonl", Conversation("huge", "chat", (Message("user", "list " * 300),))
    for _ in range(2):  # a run that finds everything done tells it again
        assert generate(target, shown, [*prompts(), huge], out, SETTINGS, answer_all).records == 15
        assert capsys.readouterr().err.startswith(
            f"{out}: 1 of 15 prompts leave no room for an answer, 'huge' first"
        )
    found = records(out)
    assert (found["huge"]["finish_reason"], found.pop("huge")["completion_tokens"]) == ("too_long", 0)
    assert found == records(answers)


def test_what_the_template_does_not_show_of_a_prompt_is_named(
    target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path, capsys: Any
) -> None:
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    asked = [replace(p, tools=tools) if i == 2 else p for i, p in enumerate(prompts(4))]
    report = generate(target, shown, asked, tmp_path / "answers.jsonl", SETTINGS, answer_all)
    assert report.unshown == {"tools": 1} and report.records == 4
    assert "not shown by the chat template: tools (in 1)" in capsys.readouterr().err


def test_a_conversation_that_fills_the_context_ends_with_its_last_answer(
    target: TransformersTarget, shown: TemplateFormat, tmp_path: Path
) -> None:
    # answers end at once
    info = replace(target.info, stop_token_ids=tuple(range(20, target.info.vocab_size)))
    stopping = TransformersTarget(target.model, info)
    turns = Conversation("t", "chat", (Message("user", "list " * 60),) * 4)
    generate(stopping, shown, [turns], tmp_path / "a.jsonl", SETTINGS, PaddedAnswers(stopping, 4))
    record = records(tmp_path / "a.jsonl")["t"]
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 3
    assert record["finish_reason"] == "length"


@pytest.mark.parametrize("made", [EngineAnswers, PaddedAnswers])
def test_a_long_neighbour_does_not_shorten_an_answer(target: TransformersTarget, made: Any) -> None:
    settings = replace(SETTINGS, temperature=0.0)
    lengths = [
        len(a.tokens) for a in made(target, 4)([(4, 20, 31), (7,) * 250, (7,) * 256], [(0, 0)] * 3, settings)
    ]
    assert lengths == [12, 6, 0]


def test_a_row_that_filled_the_context_does_not_end_its_batch() -> None:
    target = make_family("gpt2")  # positions are rows of a table of 256
    tokens, seeds = [(7,) * 250, *[(4, 20, 31)] * 7], [(0, i) for i in range(8)]
    found = PaddedAnswers(target, 8)(tokens, seeds, SETTINGS)
    assert len(found[0].tokens) == 6
    assert max(len(a.tokens) for a in found) == 12


def test_an_engine_whose_memory_ends_before_the_context_limits_answers_too(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = lambda **given: EngineSettings(**given, max_length=40)  # noqa: E731
    monkeypatch.setattr("draftkit.engine.answers.EngineSettings", limited)
    found = EngineAnswers(target, 4)([(7,) * 40, (7,) * 37], [(0, 0)] * 2, replace(SETTINGS, temperature=0.0))
    assert [len(a.tokens) for a in found] == [0, 3]


def test_several_turns_are_answered_under_a_template_that_insists_on_alternating_roles(
    target: TransformersTarget, target_folder: Path, answer_all: Answers, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role + m.content }}{% endfor %}"
    )
    turns = Conversation("t", "chat", (Message("user", "add"), Message("user", "return")))
    told = TemplateFormat(tokenizer)
    assert generate(target, told, [turns], tmp_path / "a.jsonl", SETTINGS, answer_all).records == 1


def test_a_file_that_holds_answers_twice_is_refused(
    answers: Path, target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    lines = answers.read_bytes().splitlines(keepends=True)
    out = copy_records(b"".join([*lines, *lines[3:5]]), tmp_path / "a.jsonl", answers)
    with pytest.raises(DataError, match=rf"holds 2 answers twice, '{json.loads(lines[3])['id']}' first"):
        generate(target, shown, prompts(), out, SETTINGS, answer_all)


def test_another_template_other_switches_or_other_stop_tokens_are_refused(
    answers: Path, target: TransformersTarget, target_folder: Path, shown: TemplateFormat, answer_all: Answers
) -> None:
    for change, what in (
        (lambda t: setattr(t, "chat_template", t.chat_template + " "), "another chat template"),
        (lambda t: t.add_tokens("<new>"), "another tokenizer"),
    ):
        tokenizer = load_tokenizer(str(target_folder))
        change(tokenizer)
        with pytest.raises(DataError, match=f"was begun with {what}; choose another file"):
            generate(target, TemplateFormat(tokenizer), prompts(), answers, SETTINGS, answer_all)
    switched = TemplateFormat(shown.tokenizer, {"message": 1})  # a word of the tiny template
    with pytest.raises(DataError, match="was begun with other template switches"):
        generate(target, switched, prompts(), answers, SETTINGS, answer_all)
    stopping = TransformersTarget(target.model, replace(target.info, stop_token_ids=(2, 5)))
    with pytest.raises(DataError, match="was begun with other stop tokens"):
        generate(stopping, shown, prompts(), answers, SETTINGS, answer_all)


def test_a_file_that_generate_did_not_write_is_left_alone(
    answers: Path, target: TransformersTarget, shown: TemplateFormat, answer_all: Answers, tmp_path: Path
) -> None:
    out, manifest = tmp_path / "mine.jsonl", tmp_path / "mine.manifest.json"
    out.write_bytes(answers.read_bytes())
    with pytest.raises(DataError, match=rf"^{out}: is there, and no mine\.manifest\.json"):
        generate(target, shown, prompts(), out, SETTINGS, answer_all)
    for damaged in ("{", "[1]", "3"):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match=rf"^{manifest}: is damaged"):
            generate(target, shown, prompts(), out, SETTINGS, answer_all)
    assert out.read_bytes() == answers.read_bytes()
