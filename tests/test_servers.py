"""Generation through servers: every prompt answered once, whatever the servers do."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from draftkit.data import servers as servers_module
from draftkit.data.generate import generate_file
from draftkit.data.messages import Conversation, Message
from draftkit.data.records import made_with
from draftkit.data.servers import ServerAnswers
from draftkit.errors import ServeError
from draftkit.settings import GenerateSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.records import prompts, records
from support.stub_server import MODEL, StubServer, answer_to, stubs

SETTINGS = GenerateSettings(max_new_tokens=12, temperature=0.7, top_k=20, batch_size=4, seed=5)


@pytest.fixture(scope="module")
def shown(target_folder: Path) -> TemplateFormat:
    return TemplateFormat(load_tokenizer(str(target_folder)))


@pytest.fixture
def probe(shown: TemplateFormat) -> int:
    """Tokens of the message by which a server is looked at."""
    return len(shown.prompt([{"role": "user", "content": "Hello"}]))


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers_module, "FIRST_REST", 0.02)
    monkeypatch.setattr(servers_module, "LONGEST_REST", 0.1)
    monkeypatch.setattr(servers_module, "_LOOK", 0.05)


def generate(shown: TemplateFormat, out: Path, servers: list[StubServer], count: int = 30) -> dict[str, Any]:
    answers = ServerAnswers([s.url for s in servers], shown, 4)
    about = made_with(shown, "a server", (), SETTINGS)
    generate_file(answers, shown, lambda first: prompts(count)[first:], out, SETTINGS, about)
    found = records(out)
    assert len(found) == len(out.read_bytes().splitlines()), "an answer is kept once"
    return found


def check_ids(found: dict[str, Any], shown: TemplateFormat, count: int = 30) -> None:
    assert len(found) == count
    for prompt in prompts(count):
        ids = shown.prompt(prompt.as_dicts())
        [turn] = found[prompt.id]["answers"]
        assert (tuple(turn["prompt_ids"]), turn["answer_ids"]) == (ids, answer_to(ids))


def test_ids_go_out_and_come_back_and_sampling_fields_have_their_names(
    shown: TemplateFormat, probe: int, tmp_path: Path
) -> None:
    together = Barrier(2)  # neither server answers before both were asked
    with stubs(StubServer(probe, first=together), StubServer(probe, first=together)) as servers:
        check_ids(generate(shown, tmp_path / "a.jsonl", servers), shown)
    answered = [ids for s in servers for ids in s.answered]
    assert len(answered) == len(set(answered)) == 30 and all(s.answered for s in servers)
    body = servers[0].asked[0]
    assert (body["model"], body["temperature"], body["top_k"], body["top_p"], body["max_tokens"]) == (
        MODEL,
        0.7,
        20,
        1.0,
        12,
    )
    assert 0 <= body["seed"] < 2**31 and body["return_token_ids"] is True
    assert len({b["seed"] for s in servers for b in s.asked}) == 30


@pytest.mark.parametrize("trouble", ["429", "html", "half a body", "500", "other model", "closes"])
def test_a_server_in_trouble_does_not_hold_the_rest_and_no_prompt_is_answered_twice(
    trouble: str, shown: TemplateFormat, probe: int, tmp_path: Path
) -> None:
    """It fails after three answers, and stays in trouble."""
    with stubs(StubServer(probe, trouble=trouble, well_for=3), StubServer(probe)) as servers:
        check_ids(generate(shown, tmp_path / "a.jsonl", servers), shown)


def test_a_server_that_hangs_holds_nothing_up(
    shown: TemplateFormat, probe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer and without an end; what it was asked is asked elsewhere, and answered once."""
    monkeypatch.setattr(servers_module, "OVERDUE", 0.3)
    began, together = time.monotonic(), Barrier(2)
    hangs = StubServer(probe, trouble="hangs", well_for=3, first=together)
    with stubs(hangs, StubServer(probe, first=together)) as servers:
        check_ids(generate(shown, tmp_path / "a.jsonl", servers), shown)
        assert len(servers[0].asked) > 3
    assert time.monotonic() - began < servers_module.TIMEOUT.read, "which would end the wait for it"


def test_an_answer_that_comes_late_is_not_the_answer_to_the_next_turn(
    shown: TemplateFormat, probe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation's turns have one key; both servers answer, one of them slowly."""
    monkeypatch.setattr(servers_module, "OVERDUE", 0.1)
    turns = tuple(Message("user", word) for word in ("one", "two", "three", "four"))
    about = made_with(shown, "a server", (), SETTINGS)
    with stubs(StubServer(probe, trouble="slow"), StubServer(probe)) as servers:
        answers = ServerAnswers([s.url for s in servers], shown, 2)
        asked = [Conversation(f"c{i}", "chat", turns) for i in range(6)]
        generate_file(answers, shown, lambda first: asked[first:], tmp_path / "a.jsonl", SETTINGS, about)
    for record in records(tmp_path / "a.jsonl").values():
        assert all(t["answer_ids"] == answer_to(t["prompt_ids"]) for t in record["answers"])


def test_servers_that_all_fail_end_the_run_and_it_goes_on_later(
    shown: TemplateFormat, probe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers_module, "GIVE_UP", 0.2)
    out = tmp_path / "a.jsonl"
    with (
        stubs(StubServer(probe, trouble="500", well_for=8)) as servers,
        pytest.raises(ServeError, match=r"no server is left to answer \(http.*: answers 500\)"),
    ):
        generate(shown, out, servers)
    first = set(servers[0].answered)
    with stubs(StubServer(probe)) as servers:
        check_ids(generate(shown, out, servers), shown)
    assert 0 < len(first) < 30 and not first & set(servers[0].answered), (
        "what was answered is not asked again"
    )


def test_a_server_without_ids_is_asked_by_messages(shown: TemplateFormat, probe: int, tmp_path: Path) -> None:
    with stubs(StubServer(probe, ids=False)) as servers:
        found = generate(shown, tmp_path / "a.jsonl", servers, 5)
    assert servers[0].asked[0]["messages"][0]["role"] == "user"
    assert all("answers" not in r for r in found.values())
    assert found["p1"]["messages"][-1] == {
        "role": "assistant",
        "content": "an answer",
        "reasoning_content": "a thought",
    }


def test_another_model_another_template_or_no_server_is_refused_first(
    shown: TemplateFormat, probe: int
) -> None:
    with (
        stubs(StubServer(probe)) as [good],
        pytest.raises(ServeError, match=f"does not serve 'x' but {MODEL}"),
    ):
        ServerAnswers([good.url], shown, 4, "x")
    with stubs(StubServer(probe + 3)) as [other], pytest.raises(ServeError, match="another chat template"):
        ServerAnswers([other.url], shown, 4)
    with pytest.raises(ServeError, match="is no OpenAI-compatible server"):
        ServerAnswers(["http://127.0.0.1:9"], shown, 4)


def test_a_question_that_is_refused_names_the_conversation(
    shown: TemplateFormat, probe: int, tmp_path: Path
) -> None:
    refused = r"refuses conversation p\d+ \(400: not now\)"
    with stubs(StubServer(probe, trouble="400")) as servers, pytest.raises(ServeError, match=refused):
        generate(shown, tmp_path / "a.jsonl", servers)
