"""DeepSeek-V4's prompt format: DeepSeek's own encoder and parser (PyPI `deepseek-recipe`), not a Jinja
template.

What the encoder writes of its own are special tokens; what people and tools wrote is text, also where it
spells a special token's name, and is tokenised without the added vocabulary. There are two generations of the
encoder: the preview checkpoints (DeepSeek-V4-Flash, -Pro, *-DSpark) do not know the effort "low" and begin
"max" as the official ones begin "high"."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from typing import Any

from draftkit.errors import ConfigError, TargetError
from draftkit.target.answer_parts import AnswerParts
from draftkit.target.deepseek_v4_answers import DeepseekAnswer, DeepseekReader, Stage
from draftkit.target.deepseek_v4_encoder import encoder_digest, generation, load_recipe
from draftkit.target.deepseek_v4_messages import (
    FIELDS,
    check_request,
    fields_of,
    message_of,
    reasoning_of,
    schema_of,
    tool_of,
)
from draftkit.target.prompt_format import (
    CallForm,
    Message,
    RewrittenError,
    TemplateError,
    Tools,
    Turn,
    is_answer,
)

DSML, EOS, OPEN, CLOSE = "｜DSML｜", "<｜end▁of▁sentence｜>", "<think>", "</think>"
ASSISTANT, URL_MARK = "<｜Assistant｜>", "<｜extracted_url｜>"
NEEDED = ("<｜begin▁of▁sentence｜>", EOS, "<｜User｜>", ASSISTANT, OPEN, CLOSE, DSML)
EFFORTS = ("low", "high", "max")
SAME = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}  # as DeepSeek's API takes them
ENCODERS = ("official", "preview")
_SWITCHES = ("thinking", "enable_thinking", "reasoning_effort", "drop_thinking", "encoder")
Piece = tuple[str, bool]  # text, and whether it is one special token


def speaks_deepseek_v4(tokenizer: Any) -> bool:
    """Whether this is the tokenizer of a V4 model: no template, and DeepSeek's markup as a token."""
    return not tokenizer.chat_template and DSML in tokenizer.get_vocab()


@dataclass(frozen=True)
class Mode:
    """How the model is asked to think."""

    thinking: bool
    effort: str | None  # the recipe's; None: without thinking
    drop: bool


class DeepseekFormat:
    """Messages and tools to token ids and back. Switches: `thinking` (`enable_thinking`), `reasoning_effort`
    (none, low, high, max and the API's other names), `drop_thinking`, `encoder` (official, preview; by the
    checkpoint's name where it is not given).

    Raises ConfigError for other switches or values, TargetError when `deepseek-recipe` is not installed or
    the tokenizer lacks its tokens."""

    def __init__(
        self, tokenizer: Any, switches: Mapping[str, Any] | None = None, today: date | None = None
    ) -> None:
        self.tokenizer, self.switches, self.today = tokenizer, dict(switches or {}), today
        self._recipe = load_recipe()
        vocabulary = tokenizer.get_vocab()
        lacking = [name for name in NEEDED if name not in vocabulary]
        if lacking:
            raise TargetError(
                f"{tokenizer.name_or_path}: has no token {lacking[0]}; give DeepSeek-V4's own tokenizer"
            )
        self._ids = {name: vocabulary[name] for name in vocabulary if "｜" in name or name in (OPEN, CLOSE)}
        self._names = {number: name for name, number in self._ids.items()}
        self._plain = _without_added_tokens(tokenizer)
        self.check_switches(self.switches)
        self.mode = self._mode()

    def with_switches(self, switches: Mapping[str, Any]) -> DeepseekFormat:
        """The same format with other switches on top of its own. Raises ConfigError."""
        return DeepseekFormat(self.tokenizer, {**self.switches, **switches}, self.today)

    @property
    def digest(self) -> str:
        """sha256 of what the encoder makes of a fixed conversation: it changes when the encoder does."""
        return encoder_digest()

    @property
    def call_form(self) -> CallForm | None:
        """See `PromptFormat`."""
        return "dsml"

    def mentions(self, name: str) -> bool:
        """Whether the format has a place for this: a switch, or a field of messages."""
        return name in (*_SWITCHES, *FIELDS, "tools", "tool_calls", "reasoning_content")

    def check_switches(self, switches: Mapping[str, Any]) -> None:
        """Raise ConfigError for a switch that DeepSeek-V4 does not have, or a value that it does not take."""
        for name, value in switches.items():
            if name not in _SWITCHES:
                raise ConfigError(
                    f"template switch {name}: DeepSeek-V4 has {', '.join(_SWITCHES)}; remove or rename it"
                )
            if name == "encoder" and value not in ENCODERS:
                raise ConfigError(
                    f"template switch encoder: {value!r} is not known, choose {' or '.join(ENCODERS)}"
                )
            if name.endswith("thinking") and type(value) is not bool:
                raise ConfigError(f"template switch {name}: {value!r} must be true or false")
        effort = switches.get("reasoning_effort", "high")
        if not isinstance(effort, str) or SAME.get(effort, effort) not in (*EFFORTS, "none"):
            raise ConfigError(
                f"template switch reasoning_effort: {effort!r} is not known, choose none, "
                + ", ".join(EFFORTS)
            )
        if effort == "none" and switches.get("thinking", switches.get("enable_thinking")):
            raise ConfigError(
                "template switch reasoning_effort: none, but thinking is on; give one of the two"
            )

    @property
    def encoder(self) -> str:
        """The generation of the encoder: the switch, or what the checkpoint's name says."""
        return self.switches.get("encoder") or generation(str(self.tokenizer.name_or_path)) or "official"

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[int, ...]:
        """Token ids up to where the assistant begins to write. Raises TemplateError."""
        return self._encoded(self._prompt_pieces(messages, tools))

    def text(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """The prompt as text, special tokens by their names."""
        return "".join(text for text, _ in self._prompt_pieces(messages, tools))

    def turns(self, messages: Sequence[Message], tools: Tools | None = None, cut: bool = False) -> list[Turn]:
        """Every answer of a conversation in its own context, in order. Raises RewrittenError for one that was
        thought about after a task or a prefix, where the model does not think."""
        found = []
        for place, message in enumerate(messages):
            if is_answer(messages, place):
                ended = not (cut and place == len(messages) - 1)
                prompt = self.prompt(messages[:place], tools)
                thinks = self._stage(prompt) in ("ReasoningStart", "ReasoningContinuation")
                if self.mode.thinking and not thinks and reasoning_of(message):
                    raise RewrittenError(
                        "after a task or a prefix nothing is thought, and the answer has that"
                    )
                written = self._written(message, ended, thinks)
                found.append(Turn(prompt, self._encoded(written)))
        return found

    def parse(self, answer_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> AnswerParts:
        """An answer's reasoning, content and tool calls."""
        stream = self.stream(prompt_ids)
        stream.add(answer_ids)
        return stream.finish()

    def stream(self, prompt_ids: Sequence[int] = ()) -> DeepseekAnswer:
        """A parser that takes an answer's tokens as they come."""
        return DeepseekAnswer(self._recipe, self.tokenizer, self._names, self._stage(prompt_ids))

    def reader(self, prompt_ids: Sequence[int] = (), with_calls: bool = True) -> DeepseekReader:
        """A parser that takes an answer's text as it comes."""
        return DeepseekReader(self.stream(prompt_ids))

    def _stage(self, prompt_ids: Sequence[int]) -> Stage:
        """Where the answer to a prompt begins: in its thinking where <think> is the prompt's last special
        token, and in what goes on where text follows that. Without a prompt the mode says it."""
        places = (i for i in reversed(range(len(prompt_ids))) if prompt_ids[i] in self._names)
        if (last := next(places, None)) is None:
            return "ReasoningStart" if self.mode.thinking else None
        begun = last < len(prompt_ids) - 1
        if prompt_ids[last] == self._ids[OPEN]:
            return "ReasoningContinuation" if begun else "ReasoningStart"
        return "ContentContinuation" if begun else None

    def unshown(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[str, ...]:
        """What of a conversation the model is not shown."""
        return ("name",) if any(m.get("name") for m in messages) else ()

    # --- writing

    def _mode(self) -> Mode:
        asked = self.switches.get("reasoning_effort", "high")
        asked = SAME.get(asked, asked)
        on = self.switches.get("thinking", self.switches.get("enable_thinking", True)) and asked != "none"
        drop = self.switches.get("drop_thinking", True)
        if not on:
            return Mode(False, None, drop)
        if self.encoder == "preview":
            if asked == "low":
                raise ConfigError(
                    "template switch reasoning_effort: the preview encoder has no low; choose high or max"
                )
            asked = {"high": "low", "max": "high"}[asked]  # what the official one calls the same text
        return Mode(True, asked, drop)

    def _prompt_pieces(self, messages: Sequence[Message], tools: Tools | None) -> list[Piece]:
        try:
            check_request(messages, self.switches)
        except (ValueError, TypeError) as error:
            raise TemplateError(str(error)) from error
        task = messages[-1].get("task") if messages else None
        if task is not None and f"<｜{task}｜>" not in self._ids:
            raise TemplateError(f"the tokenizer has no token for the task {task!r}")
        mode = self.mode if task in (None, "action") else Mode(False, None, self.mode.drop)
        pieces = self._rendered(messages, tools, mode)
        if mode.thinking and not mode.drop:
            pieces = _with_thoughts(pieces, messages)
        if task == "action":
            return [*pieces, ("<｜action｜>", True)]
        if task == "read_url":
            pieces = [*_with_url(pieces[:-2]), *pieces[-2:]]
        return [*pieces[:-2], (f"<｜{task}｜>", True)] if task else pieces

    def _rendered(self, messages: Sequence[Message], tools: Tools | None, mode: Mode) -> list[Piece]:
        recipe = self._recipe
        try:
            schema = next((schema_of(m) for m in messages if "response_format" in fields_of(m)), None)
            conversation = recipe.Conversation(
                [message_of(recipe, m) for m in messages],
                thinking_mode=mode.thinking,
                tools=[tool_of(recipe, t) for t in tools] if tools else None,
                reasoning_effort=mode.effort,
                response_schema=schema,
            )
            rendered = recipe.DeepseekV4Encoding().render_conversation(conversation)
        except KeyError as error:  # of a call or a tool
            raise TemplateError(f"{error} is missing") from error
        except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise TemplateError(" ".join(str(error).split()) or type(error).__name__) from error
        return list(_pieces(rendered.prompt, rendered.special_ranges))

    def _written(self, message: Message, ended: bool, thinks: bool) -> list[Piece]:
        """What the assistant wrote after a prompt that has opened its thinking, or has not; its end included
        where it wrote one."""
        left_out = (*FIELDS, "wo_eos", "reasoning_content", "reasoning")
        bare = {k: v for k, v in message.items() if k not in left_out}
        quiet = Mode(False, None, True)
        pieces = self._rendered([{"role": "user", "content": ""}, bare], None, quiet)
        first = next(i for i, piece in enumerate(pieces) if piece == (CLOSE, True)) + 1
        last = max(i for i, piece in enumerate(pieces) if piece == (EOS, True))
        thought = [(reasoning_of(message) or "", False), (CLOSE, True)] if thinks else []
        return [*thought, *pieces[first : last + ended]]

    def _encoded(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        ids: list[int] = []
        for text, special in pieces:
            ids += [self._ids[text]] if special else self._plain.encode(text, add_special_tokens=False).ids
        return tuple(ids)


def _without_added_tokens(tokenizer: Any) -> Any:
    """The tokenizer for plain text: it knows no special token by its name."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bare = backend | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return import_module("tokenizers").Tokenizer.from_str(json.dumps(bare))


def _pieces(text: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    at = 0
    for start, end in ranges:
        if at < start:
            yield text[at:start], False
        yield text[start:end], True
        at = end
    if at < len(text):
        yield text[at:], False


def _with_url(pieces: list[Piece]) -> list[Piece]:
    """The URL at the end of the question, after its mark: a special token in this task, as DeepSeek's own
    encoder has it."""
    question, mark, url = pieces[-1][0].rpartition(URL_MARK)
    return [*pieces[:-1], (question, False), (URL_MARK, True), (url, False)] if mark else pieces


def _with_thoughts(pieces: Sequence[Piece], messages: Sequence[Message]) -> list[Piece]:
    """What the encoder dropped of earlier thinking, put back: it writes an answer's beginning with </think>
    then."""
    answers = [m for m in messages if m["role"] == "assistant"]
    found: list[Piece] = []
    number = 0  # of answers that have ended
    for piece in pieces:
        if piece == (CLOSE, True) and found[-1:] == [(ASSISTANT, True)] and number < len(answers):
            found += [(OPEN, True), (reasoning_of(answers[number]) or "", False)]
        number += piece == (EOS, True)
        found.append(piece)
    return found
