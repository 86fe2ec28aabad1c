"""Forms of answers that are meant to crash or stall the server: each is a 400 that says why, and others are
served on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from draftkit.serve import grammar_check, structured, token_table
from draftkit.serve.formats import ForcedCalls, StructuredOutputs
from draftkit.serve.grammar_source import GrammarSource
from draftkit.serve.grammar_tester import GrammarTester
from draftkit.serve.guard import Guarded
from draftkit.serve.problem import ApiError
from draftkit.serve.structured import GrammarConstraint, Grammars, constraint_of
from support.fake_engine import ASSET, fake_served
from support.patience import PATIENCE
from support.server import Server, serving

SERVED = fake_served()


def references(count: int) -> dict[str, Any]:
    """A chain: each definition is the next one."""
    chain = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(count)}
    return {"$defs": {**chain, f"a{count}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def rules(count: int) -> str:
    """A chain of rules in Lark."""
    return "start: a0\n" + "".join(f'a{i}: "x" a{i + 1}\n' for i in range(count)) + f'a{count}: "y"\n'


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


HOSTILE: dict[str, dict[str, Any]] = {
    "chained references": {"json": references(1200)},
    "chained rules": {"grammar": rules(3000)},
    "many properties": {"json": optional(5000)},
    "many choices": {"choice": [f"text number {i} of many" for i in range(20_000)]},
    "large text": {"regex": "a" * 500_000},
    "empty loops": {"grammar": 'start: a\na: a a a | a a | "" | "x"'},
    "nested rules": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    "nested JSON": {"json": '{"allOf": [' * 3000 + "{}" + "]}" * 3000},
    "repeats": {"grammar": 'start: ((("x"{1,300}){1,300}){1,300})'},
    "states": {"regex": "(.*a.{12}b|.*b.{13}c|.*c.{14}d)+x.*y.{300}z"},
}
# within the bounds of the embedded target's vocabulary; the second one nearly not, on a slow machine
WALKABLE, NEARLY = ("empty loops",), ("states",)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-body-bytes", str(2**23)) as running:
        yield running


@pytest.mark.parametrize("name", HOSTILE)
def test_a_form_that_would_take_the_server_down_is_refused_or_served(server: Server, name: str) -> None:
    body = {"prompt": "x", "max_tokens": 4, "structured_outputs": HOSTILE[name]}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or name not in WALKABLE, answer.text
    assert answer.status_code == 400 or name in WALKABLE + NEARLY, answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["message"].startswith("structured_outputs") and len(error["message"]) < 800
    assert server.process.poll() is None and server.http.get("/health").status_code == 200


def test_forced_calls_are_tried_like_any_other_form() -> None:
    functions = ({"name": "f", "parameters": references(1200)},)
    with pytest.raises(ApiError, match="chained too deeply") as caught:
        constraint_of(ForcedCalls(functions, many=False), SERVED)
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_a_good_form_is_compiled_once_and_serves_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (
        StructuredOutputs.model_validate(form) for form in ({"regex": "[0-9]{3}"}, {"grammar": rules(3000)})
    )
    for _ in range(2):
        with pytest.raises(ApiError, match="chained too deeply"):
            constraint_of(bad, SERVED)
        assert constraint_of(good, SERVED) is not None
    monkeypatch.setattr(GrammarTester, "ask", None)  # nobody is asked again
    assert constraint_of(good, SERVED) is not None


def test_first_requests_that_come_together_share_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Grammars] = []

    class Slow(Grammars):
        def __init__(self, *given: Any) -> None:
            made.append(self)
            time.sleep(0.2)
            super().__init__(*given)

    monkeypatch.setattr(structured, "Grammars", Slow)
    structured._grammars.cache_clear()
    form = StructuredOutputs.model_validate({"choice": ["yes", "no"]})
    with ThreadPoolExecutor(8) as pool:
        assert None not in list(pool.map(lambda _: constraint_of(form, SERVED), range(8)))
    structured._grammars.cache_clear()
    assert len(made) == 1


def test_a_grammar_that_takes_long_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a process of its own; those that are over in a moment do not. Which takes long is said
    here: how long one takes depends on the machine."""
    slow = StructuredOutputs.model_validate({"json": optional(20)})
    quick = StructuredOutputs.model_validate({"choice": ["yes", "perhaps"]})
    grammars = structured._grammars(SERVED.tokenizer, SERVED.engine.info.vocab_size)
    ask, waits, turn = grammars._quick.ask, Event(), grammars._slow.turn

    def said(source: str) -> dict[str, Any]:
        return {"slow": True} if "p19" in source else ask(source)

    def noted() -> Any:
        waits.set()
        return turn()

    monkeypatch.setattr(grammars._quick, "ask", said)
    with ThreadPoolExecutor(1) as pool:
        with turn():
            monkeypatch.setattr(grammars._slow, "turn", noted)
            tried = pool.submit(constraint_of, slow, SERVED)
            assert waits.wait(PATIENCE)
            assert constraint_of(quick, SERVED) is not None and not tried.done()
        assert tried.result(PATIENCE) is not None


def test_a_grammar_that_takes_the_quick_process_too_long_is_called_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few milliseconds are allowed here, of processor time; it takes hundreds."""
    monkeypatch.setattr(grammar_check, "QUICK_SECONDS", 0.005)
    vocab = SERVED.engine.info.vocab_size
    table = structured._grammars(SERVED.tokenizer, vocab).table
    line = GrammarSource("schema", optional(2000)).dump()
    assert grammar_check._in_a_fork(line, table, slow=False) == {"slow": True}


def test_an_answer_ends_with_an_error_when_its_grammar_does() -> None:
    class Broken:
        def compute_bitmask(self) -> bytes:
            return b"\xff" * (SERVED.engine.info.vocab_size // 8 + 1)

        def try_consume_tokens(self, tokens: list[int]) -> int:
            return 0

        def is_error(self) -> bool:
            return False

    matcher: Any = Broken()
    vocab = SERVED.engine.info.vocab_size
    guarded = Guarded(GrammarConstraint(matcher, [0], vocab), vocab)
    assert guarded.allowed()[7] and not guarded.accept(7)
    assert guarded.finished and "allowed and then not taken" in str(guarded.error)


@pytest.mark.parametrize("special", [False, True])
def test_a_tag_that_is_one_token_is_written_once(special: bool) -> None:
    """llguidance takes any added token like <this> for a special one, which no text contains: the answer
    repeated the tag until it was full."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    tokenizer.add_tokens(
        [AddedToken(t, special=special, normalized=False) for t in ("<tool_call>", "</tool_call>")]
    )
    grammars = Grammars(tokenizer, len(tokenizer))
    matcher = grammars.matcher(GrammarSource("calls", ["json", [{"name": "now"}], False]))
    constraint = GrammarConstraint(matcher, grammars.table.eos_tokens, len(tokenizer))
    tokens: list[int] = []
    while not constraint.finished and len(tokens) < 200:
        token = int(constraint.allowed().nonzero()[-1])
        assert constraint.accept(token)
        tokens.append(token)
    text = tokenizer.decode(tokens[:-1])
    assert constraint.finished and text == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    one = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert (one in tokens) != special


def test_formats_that_nobody_knows_are_annotations() -> None:
    """JSON Schema says so, and Pydantic writes them: `format: path`, `format: binary`."""
    schema = {
        "properties": {"format": {"type": "string", "format": "path"}, "x": {"const": {"format": "path"}}}
    }
    form = StructuredOutputs.model_validate(
        {"json": {**schema, "required": ["format", "x"], "additionalProperties": False}}
    )
    constraint = constraint_of(form, SERVED)
    assert constraint is not None
    for token in SERVED.texts.encode('{"format": "/tmp", "x": {"format": "path"}}', False):
        assert constraint.accept(token)
    with pytest.raises(ApiError):
        constraint_of(
            StructuredOutputs.model_validate({"json": {"type": "string", "pattern": "a(?=b)"}}), SERVED
        )


@pytest.mark.slow
def test_an_ordinary_schema_passes_with_a_vocabulary_of_real_size() -> None:
    """The first mask of a table took 0.15 s for 49,152 tokens, in each trial: every form was refused."""
    chance = random.Random(0)
    words = {
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(150_000)
    }
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(words), "<end>"]
    model = models.BPE({name: number for number, name in enumerate(dict.fromkeys(names))}, [])
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    text = {"type": "string", "minLength": 1, "maxLength": 40}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"], "additionalProperties": False}
    grammars = Grammars(tokenizer, len(tokenizer))
    constraint = GrammarConstraint(
        grammars.matcher(GrammarSource("schema", schema)), grammars.table.eos_tokens, len(tokenizer)
    )
    assert constraint.allowed().any()


def test_the_first_mask_of_a_table_is_made_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes what all others use, for which no answer should wait."""
    made: list[LLTokenizer] = []

    def matcher(table: LLTokenizer, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(compute_bitmask=lambda: made.append(table))

    monkeypatch.setattr(token_table, "LLMatcher", matcher)
    assert made == [Grammars(SERVED.tokenizer, SERVED.engine.info.vocab_size).table]
