"""DeepSeek-V4's own fields of messages in files of conversations: a task, a response format, a prefix go
from a file through `generate`, records and `capture`, token for token as DeepSeek's encoder has them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import httpx
import pytest
from typer.testing import CliRunner

from draftkit import cli
from draftkit.data.answers import Answer, Question
from draftkit.data.conversations import Conversation, Message, read_conversations
from draftkit.data.dialogue import Dialogue
from draftkit.data.messages import WrittenTurn
from draftkit.data.records import asked_hash
from draftkit.data.row_forms import conversation_of
from draftkit.data.samples import CutAnswers, SampleCounts, samples_of
from draftkit.data.server_requests import Server, answer_of
from draftkit.data.sources import Mixture, mix
from draftkit.data.traces import make_traces
from draftkit.decode import decode
from draftkit.errors import ServeError
from draftkit.evaluate_stages import every_turn, first_turns
from draftkit.features.store import FeatureStore
from draftkit.features.texts import chunks
from draftkit.ops.sampling import Sampling
from draftkit.settings import GenerateSettings
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.loading import load_target
from draftkit.target.prompt_format import TemplateError
from support.deepseek_v4 import said, system, tiny_folder, user, whole_tokenizer
from support.patience import PATIENCE
from support.records import records
from support.stub_server import MODEL, StubServer, stubs

TOKENIZER = whole_tokenizer()
OWN = recipe.DeepseekV4Encoding().with_tokenizer(
    recipe.Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
)
SCHEMA = {
    "type": "object",
    "properties": {"é": {"type": "string", "description": "<think> <｜User｜> </think>"}},
}
Row = list[dict[str, Any]]


ASKED: dict[str, Row] = {
    **{task: [user("Add 3.", task=task)] for task in ("action", "query", "authority", "domain")},
    "read_url": [user("Add 3.<｜extracted_url｜>step", task="read_url")],
    "title": [user("Add 3."), said("Step 1.", task="title")],
    "prefix": [user("Add 3."), said("Step 1", prefix=True)],
    "thought prefix": [user("Add 3."), said("", reasoning_content="Step", prefix=True)],
    "schema": [
        system({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}),
        user("Add 3."),
    ],
    "object": [system({"type": "json_object"}), user("Add 3.")],
}


def token(task: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(f"<｜{task}｜>"))


def by_deepseek(name: str, encoder: str) -> list[int]:
    """The prompt's ids as DeepSeek's package encodes them; tasks, which it does not know, are put where its
    description has them."""
    if name == "read_url":
        text = "<｜begin▁of▁sentence｜><｜User｜>Add 3.<｜extracted_url｜>step<｜read_url｜>"
        return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    asked, thought, schema = (
        recipe.UserMessage("Add 3."),
        name not in ASKED or "task" not in str(ASKED[name]),
        None,
    )
    messages = [asked]
    if name == "title":
        messages.append(recipe.AssistantMessage("Step 1."))
    if name == "prefix":
        messages.append(recipe.AssistantMessage("Step 1", prefix=True))
    if name == "thought prefix":
        messages.append(recipe.AssistantMessage("", "Step", prefix=True))
    if name in ("schema", "object"):
        messages.insert(0, recipe.SystemMessage("S"))
        schema = SCHEMA if name == "schema" else {"type": "json_object"}
    thinking = thought or name == "action"
    effort = ("high" if encoder == "official" else "low") if thinking else None
    ids: list[int] = OWN.encode(
        recipe.Conversation(messages, thinking_mode=thinking, reasoning_effort=effort, response_schema=schema)
    )
    if name == "action":
        return [*ids, token("action")]
    return ids if thinking else [*ids[:-2], token(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("v4") / "DeepSeek-V4-tiny", TOKENIZER)


@pytest.fixture(scope="module", params=["official", "preview"])
def encoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def words(folder: Path, encoder: str) -> list[str]:
    sets = [f"target.path={folder}", f"target.template_switches={{encoder: {encoder}}}"]
    sets += ["generate.max_new_tokens=6", "generate.temperature=0", "capture.max_length=2048"]
    return ["-r", "tiny-deepseek-v4", *(word for one in sets for word in ("--set", one))]


def ran(*words: object) -> None:
    done = CliRunner().invoke(cli.app, [*map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)


def write(path: Path, rows: dict[str, Row]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "messages": m}) + "\n" for n, m in rows.items()), "utf-8")
    return path


@pytest.fixture(scope="module")
def answers(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("answers")
    ran("generate", *words, "-p", write(work / "p.jsonl", ASKED), "-o", work / "a.jsonl")
    return work / "a.jsonl"


@pytest.mark.slow
def test_prompts_are_deepseeks_own_and_answers_what_the_target_writes_after_them(
    answers: Path, folder: Path, encoder: str
) -> None:
    target, made = load_target(str(folder)), records(answers)
    shown = DeepseekFormat(TOKENIZER, {"encoder": encoder})
    assert made.keys() == ASKED.keys()
    for name, record in made.items():
        answer = record["answers"][-1]
        assert answer["prompt_ids"] == by_deepseek(name, encoder), name
        alone = decode(target, None, answer["prompt_ids"], Sampling(0.0), 6).tokens
        assert tuple(answer["answer_ids"]) == alone, name
        message = answer.get("message") or record["messages"][-1]
        thinks = name in ("thought prefix", "schema", "object")
        assert bool(message.get("reasoning_content")) == thinks, "after a task or a prefix nothing is thought"
        assert thinks or message["content"]
        fields = {k for m in record["messages"] for k in m.keys() & {"task", "prefix", "response_format"}}
        assert fields == {k for m in ASKED[name] for k in m.keys() & {"task", "prefix", "response_format"}}
        if name == "title":  # the answer that the title is of is the file's, and answered anew, too
            first = record["answers"][0]
            assert first["prompt_ids"] == list(shown.prompt([user("Add 3.")]))
            assert len(record["answers"]) == 2 and record["messages"] == ASKED["title"]
        else:
            assert len(record.get("answers", ())) == 1


def learnt(folder: Path) -> dict[str, tuple[list[int], list[bool]]]:
    """Ids of a store, and which of them are learnt."""
    return {s.id: (s.tokens_T.tolist(), s.loss_mask_T.tolist()) for s in FeatureStore(folder)}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_record_is_captured_as_it_was_written(answers: Path, words: list[str], tmp_path: Path) -> None:
    ran("capture", *words, "-c", answers, "-o", tmp_path)
    found = learnt(tmp_path)
    for name, record in records(answers).items():
        for number, turn in enumerate(record["answers"]):
            ids, mask = found[name if len(record["answers"]) == 1 else f"{name}#{number}"]
            assert ids == turn["prompt_ids"] + turn["answer_ids"]
            assert mask == [False] * len(turn["prompt_ids"]) + [True] * len(turn["answer_ids"])


def test_an_answer_in_text_is_learnt_alone(words: list[str], encoder: str, tmp_path: Path) -> None:
    """What was asked, its prefix too, is context; no thinking is put before an answer that has none."""
    written = {name: [*row, said(" returns 7")] for name, row in ASKED.items()}
    ran("capture", *words, "-c", write(tmp_path / "t.jsonl", written), "-o", tmp_path / "f")
    found = learnt(tmp_path / "f")
    end = TOKENIZER.convert_tokens_to_ids(["</think>", "<｜end▁of▁sentence｜>"])
    for name in ASKED:
        ids, mask = found[name if name != "title" else "title#1"]
        answer = [*TOKENIZER(" returns 7", add_special_tokens=False)["input_ids"], end[1]]
        if name in ("thought prefix", "schema", "object"):
            answer = [end[0], *answer]
        prompt = by_deepseek(name, encoder)
        assert ids == prompt + answer, name
        assert mask == [False] * len(prompt) + [True] * len(answer), name
    assert len(found) == len(ASKED) + 1


def test_a_servers_answer_in_text_is_learnt_alone(encoder: str) -> None:
    """Of a server that gives no ids: its record is tokenised where the prompt ends."""
    shown = DeepseekFormat(TOKENIZER, {"encoder": encoder})
    for name, row in ASKED.items():
        dialogue = Dialogue(conversation_of({"id": name, "messages": row}, "f:1", "f"), shown, 0)
        while dialogue.question is not None:
            dialogue.answered(Answer((), "stop", said(" returns 7")))
        record = conversation_of(dialogue.record(), "f:1", "f")
        [sample] = samples_of([record], shown, len(TOKENIZER), SampleCounts())
        asked = by_deepseek(name, encoder)
        learnt = sample.tokens[sample.loss_mask.index(True) :]
        assert list(sample.tokens) == asked + list(learnt) and all(sample.loss_mask[len(asked) :])
        assert TOKENIZER.decode(learnt).removeprefix("</think>") == " returns 7<｜end▁of▁sentence｜>"


def test_evaluation_asks_the_same(encoder: str, tmp_path: Path) -> None:
    shown = DeepseekFormat(TOKENIZER, {"encoder": encoder})
    asked = read_conversations([write(tmp_path / "p.jsonl", ASKED)])
    for one in first_turns(shown, asked, len(asked)):
        assert list(one.tokens) == by_deepseek(one.prompt_id, encoder), one.prompt_id
    written = {name: [*row, said("7")] for name, row in ASKED.items()}
    turns = every_turn(shown, read_conversations([write(tmp_path / "t.jsonl", written)]), 99, 4096)
    found = {one.prompt_id.partition("#")[0]: list(one.tokens) for one in turns}
    assert found == {name: by_deepseek(name, encoder) for name in ASKED}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_numbers_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    shown = DeepseekFormat(TOKENIZER)
    for value in (float("nan"), 2**70, 10**400):
        with pytest.raises(TemplateError):
            shown.prompt([system({"a": value}), user("x")])


@pytest.mark.parametrize("row", ["prefix", "thought prefix", "query"])
def test_an_answer_goes_on_with_its_prefix_line_ends_too(row: str) -> None:
    """DeepSeek's parser drops line ends where an answer begins; after a prefix it does not begin."""
    shown, text = DeepseekFormat(TOKENIZER), "\n\nStep 2.\n"
    prompt = shown.prompt(ASKED[row])
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    parts, reader = shown.parse(ids, prompt), shown.reader(prompt)
    pieces = [*map(reader.add, text), reader.finish()]
    for content, thought in (
        (parts.content, parts.reasoning),
        ("".join(p.content for p in pieces), "".join(p.reasoning for p in pieces)),
    ):
        assert (thought or "") == (text if row == "thought prefix" else "")
        assert content == {"prefix": text, "thought prefix": "", "query": text.lstrip()}[row]


def test_no_format_is_no_format() -> None:
    shown = DeepseekFormat(TOKENIZER)
    plain = [{"role": "system", "content": "S"}, user("x")]
    assert shown.prompt([system({"type": "text"}), user("x")]) == shown.prompt(plain)


def test_logs_and_mixtures_keep_the_fields(tmp_path: Path) -> None:
    """The same words under another task are another conversation."""
    answer = {"choices": [{"message": said("7"), "finish_reason": "stop"}]}
    log = tmp_path / "log.jsonl"
    lines = [{"request": {"messages": row}, "response": answer} for row in ASKED.values()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, skipped = make_traces([log], tmp_path / "out")
    assert (report.repeated, report.beginnings, skipped.count) == (0, 0, 0)
    files = [f for f in (tmp_path / "out").glob("*.jsonl") if f.stat().st_size]
    kept = [c.as_dicts()[:-1] for c in read_conversations(files)]
    assert sorted(map(str, kept)) == sorted(map(str, ([_whole(m) for m in row] for row in ASKED.values())))
    source = write(tmp_path / "p.jsonl", ASKED)
    mix(Mixture.model_validate({"sources": [{"path": str(source)}]}), tmp_path / "mixed.jsonl")
    mixed = [c.as_dicts() for c in read_conversations([tmp_path / "mixed.jsonl"])]
    asks = ("task", "prefix")
    assert [m for m in mixed if any(k in one for one in m for k in asks)] == [
        [_whole(m) for m in row] for row in ASKED.values() if any(k in one for one in row for k in asks)
    ]


def _whole(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"]} | message


def test_what_has_none_of_the_fields_keeps_its_digests() -> None:
    """Records and stores that are there go on: these digests were made before the fields were known."""
    messages = (
        Message("system", "S"),
        Message("user", "Q", name="n"),
        Message("assistant", None, "R", (CALL,)),
        Message("tool", "r", tool_call_id="c"),
        Message("assistant", "A", weight=0),
    )
    tools = ({"type": "function", "function": {"name": "f"}},)
    turns = (WrittenTurn((1, 2), (3,)),)
    told = Conversation("a", "math", messages, tools, turns, "stop", {"thinking": False})
    [chunk] = chunks([told], 0, 0)
    assert asked_hash(told) == "ec6f3c71a03fdc52"
    assert chunk.digest == "6c8586d5ed470fa3cb1c411bb5a7d7621f787881782f96945c67dc56a75a848a"
    for more in ({"task": "query"}, {"response_format": SCHEMA}, {"prefix": True}):
        changed = replace(told, messages=(replace(messages[0], **more), *messages[1:]))
        assert asked_hash(changed) != asked_hash(told)
        assert next(chunks([changed], 0, 0)).digest != chunk.digest


def counts_of(row: Row, cut_answers: CutAnswers = "keep", **more: Any) -> SampleCounts:
    """What becomes of a conversation that is learnt."""
    counts, shown = SampleCounts(), DeepseekFormat(TOKENIZER)
    read = conversation_of({"id": "a", "messages": row, **more}, "f:1", "f", {})
    list(samples_of([read], shown, len(TOKENIZER), counts, cut_answers))
    return counts


@pytest.mark.parametrize("name", ["prefix", "query"])
def test_thoughts_that_the_model_cannot_have_had_are_not_learnt(name: str) -> None:
    assert counts_of([*ASKED[name], said(" returns 7")]).samples == 1
    thought = counts_of([*ASKED[name], said(" returns 7", reasoning_content="R")])
    assert (thought.samples, thought.rewritten) == (0, 1)
    going_on = [*ASKED["thought prefix"], said("7", reasoning_content=" 1")]
    assert counts_of(going_on).samples == 1


def test_the_answer_before_a_prefix_was_not_cut() -> None:
    row = [user("a"), said("b", reasoning_content="r"), user("c"), said("d", prefix=True)]
    before = counts_of(row, "drop", finish_reason="length")
    assert (before.samples, before.cut_dropped) == (1, 0)
    own = counts_of([*row, said(" e")], "drop", finish_reason="length")
    assert (own.samples, own.cut_dropped) == (1, 1)


def test_a_log_of_a_continued_answer_has_a_prefix_and_formats_are_masked(tmp_path: Path) -> None:
    secret = "sk-proj-" + "aB3dE6gH9jK2" * 3
    form = {"type": "object", "description": f"the key\n{secret}", "enum": ['a\nb@c.org "']}
    request = {"messages": [system(form), user("x"), said("Step 1")], "continue_final_message": True}
    answer = {"choices": [{"message": said(" and 2"), "finish_reason": "stop"}]}
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"request": request, "response": answer}) + "\n")
    make_traces([log], tmp_path / "out")
    [file] = [f for f in (tmp_path / "out").glob("*.jsonl") if f.stat().st_size]
    assert secret not in file.read_text()
    [read] = read_conversations([file])
    assert read.messages[0].response_format == form | {
        "description": "the key\n<token>",
        "enum": ['a\n<mail address> "'],
    }
    assert read.as_dicts()[2:] == [said("Step 1", prefix=True), said(" and 2")]


@pytest.mark.parametrize("counted", [None, -1, 0])
def test_a_server_that_shows_its_model_something_else_ends_the_run(counted: int | None) -> None:
    """One that does not know the fields leaves them out, and the answer is to another question."""
    shown = DeepseekFormat(TOKENIZER)
    settings = GenerateSettings(max_new_tokens=6)

    def answer(row: Row) -> Answer:
        prompt = shown.prompt(row)
        question = Question("a", prompt, (0, 0), tuple(row), ())
        wrong = None if counted is None else len(prompt) + counted
        [stub] = servers
        stub.prompt_tokens = wrong  # type: ignore[assignment]
        about = Server(f"http://127.0.0.1:{stub.server_port}", MODEL, False, 4096)

        async def asked() -> Answer:
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                return await answer_of(client, about, question, settings, shown)

        return asyncio.run(asked())

    with stubs(StubServer(0, ids=False)) as servers:
        assert answer([user("x")]).message
        for name, row in ASKED.items():
            if counted == 0:
                assert answer(row).message
                continue
            with pytest.raises(ServeError, match="conversation a, where this recipe shows") as told:
                answer(row)
            assert "task, response_format and prefix" in str(told.value), name
