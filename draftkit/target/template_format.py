"""A tokenizer's Jinja chat template as a prompt format: what it writes, and what of that is an answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import takewhile
from typing import Any

from draftkit.errors import ConfigError
from draftkit.target.answer_parts import AnswerParts, AnswerStyle
from draftkit.target.answer_stream import AnswerStream, parse_answer
from draftkit.target.deepseek_v4_messages import FIELDS, fields_of
from draftkit.target.prompt_format import (
    CallForm,
    Message,
    RewrittenError,
    TemplateError,
    Tools,
    Turn,
    call_with_object,
    content_text,
    is_answer,
)
from draftkit.target.rendered_ids import RenderedIds

_PROBE = "\ue000"  # a private-use character: no template and no prompt holds it
PARALLEL = "parallel tool_calls"
_OPENING = 8  # tokens at a prompt's end that may open the thinking
_TODAY = "{% macro strftime_now(form) %}{{ draftkit_days[form] }}{% endmacro %}"
_THOUGHT = re.compile(r"<think>|</think>")
_THINKING_BLOCK = re.compile(r"""type['"\]]*\s*==\s*['"]thinking['"]""")  # Ministral 3
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
# Variables that callers of a template set themselves; a switch of such a name would change what is rendered,
# not how.
_TAKEN = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template conversation "
    "tokenize "
    "return_dict return_tensors return_assistant_tokens_mask strftime_now raise_exception".split()
)


class TemplateFormat:
    """A tokenizer's Jinja chat template with its switches. `today` is the date that templates which print one
    get, where it must not be that of the clock: a run that goes on after midnight must render what it
    rendered before.

    Raises ConfigError for a switch that the template never mentions or that is not the template's to set.
    """

    def __init__(
        self, tokenizer: Any, switches: Mapping[str, Any] | None = None, today: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.switches = dict(switches or {})
        self.today = today
        self.source = _template_text(tokenizer)
        self.style = AnswerStyle.of_template(self.source)
        self._ids = RenderedIds(tokenizer)
        self.check_switches(self.switches)

    @property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @property
    def call_form(self) -> CallForm | None:
        """See `PromptFormat`."""
        return "json" if self.style.json_calls else None

    def mentions(self, name: str) -> bool:
        """Whether the template has this word."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def check_switches(self, switches: Mapping[str, Any]) -> None:
        """Raise ConfigError for a switch that the template does not know, or that is not the template's to
        set."""
        for name in switches:
            if name in _TAKEN:
                raise ConfigError(
                    f"template switch {name}: is set by draftkit; give variables of the template's own"
                )
            if not self.mentions(name):
                raise ConfigError(
                    f"template switch {name}: the target's chat template never mentions it; remove it"
                )

    def text(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """What the template writes. `options` are further variables, or arguments of `apply_chat_template`.

        Raises TemplateError with the template's reason.
        """
        self._check_fields(messages)
        try:
            shown = [self._as_template_has_it(m) for m in messages]
            variables = self._dated(tools) if self.today and self.mentions("strftime_now") else {}
            return str(
                self.tokenizer.apply_chat_template(
                    shown,
                    tools=[dict(t) for t in tools] if tools else None,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **{**variables, **self.switches, **options},
                )
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(reason) from error

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of rendered text: the template has written the special tokens."""
        return self._ids.of(text)

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[int, ...]:
        """Token ids up to where the assistant begins to write."""
        return self.encode(self.text(messages, tools))

    def turns(self, messages: Sequence[Message], tools: Tools | None = None, cut: bool = False) -> list[Turn]:
        """Every answer of a conversation in its own context. Assistant turns that nobody asked for, that say
        nothing, whose tool calls the template does not show, or that have OpenAI's weight 0 are context only.
        """
        self._check_fields(messages)
        found: list[Turn] = []
        known_text, known_ids = "", self.encode("")  # a prompt that goes on from here is tokenised from here
        for place, message in enumerate(messages):
            if not is_answer(messages, place) or (
                message.get("tool_calls") and not self.mentions("tool_calls")
            ):
                continue
            before = messages[:place]
            prompt = self.text(before, tools)
            prompt_ids = self._ids.going_on_from(known_text, known_ids, prompt)
            written = self._written(prompt, before, message, tools)
            own = None if _has_thought(message) else _EMPTY_THOUGHT.match(written)
            if own:  # the template's, not the assistant's
                prompt, written = prompt + own[0], written[own.end() :]
                prompt_ids = self.encode(prompt)
            answer_ids = self._ids.answer(written, cut and place == len(messages) - 1)
            found.append(Turn(prompt_ids, answer_ids))
            known_text, known_ids = self._ids.up_to_special(prompt, prompt_ids)
        return found

    def parse(self, answer_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> AnswerParts:
        """The reasoning, content and tool calls of an answer, whatever its prompt."""
        text = self.tokenizer.decode(answer_ids, skip_special_tokens=False)
        return parse_answer(self.style, text, tuple(self._ids.special.values()))

    def reader(self, prompt_ids: Sequence[int] = (), with_calls: bool = True) -> AnswerStream:
        """What takes the text of the answer to a prompt apart as it comes, special tokens in it where
        `marks_are_special`."""
        ending = self.tokenizer.decode(list(prompt_ids[-_OPENING:]), skip_special_tokens=False)
        opened = self.style.channels == "think" and ending.rstrip().endswith("<think>")
        special = tuple(self._ids.special.values()) if self.marks_are_special else ()
        return AnswerStream(self.style, special, opened, with_calls)

    @property
    def marks_are_special(self) -> bool:
        """Whether special tokens stand between an answer's parts: a text without them cannot be taken
        apart."""
        return not set(self._ids.special.values()).isdisjoint(self.style.marks)

    def unshown(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[str, ...]:
        """What of a conversation the template never mentions, thoughts of its last answer that it leaves out,
        and calls beside the first one where it shows one alone."""
        there = {name for m in messages for name in ("tool_calls", "name") if m.get(name)}
        there |= {"tools"} if tools else set()
        missing = {name for name in there if not self.mentions(name)}
        reasons = any(m.get("reasoning_content") for m in messages)
        never = self._reasoning_names() == () and not self._thinks_in_content()
        if reasons and (never or self._drops_last_thought(messages, tools)):
            missing.add("reasoning_content")
        if "tool_calls" not in missing and self._shows_first_call_alone(messages, tools):
            missing.add(PARALLEL)
        return tuple(sorted(missing))

    def _shows_first_call_alone(self, messages: Sequence[Message], tools: Tools | None) -> bool:
        """Whether calls that were made at the same time read as the first of them (gpt-oss)."""
        place = next((i for i, m in enumerate(messages) if len(m.get("tool_calls") or ()) > 1), None)
        if place is None:
            return False
        first = {**messages[place], "tool_calls": messages[place]["tool_calls"][:1]}
        with_all, with_first = (
            self.text([*messages[:place], said], tools, generation_prompt=False)
            for said in (messages[place], first)
        )
        return with_all == with_first

    def _drops_last_thought(self, messages: Sequence[Message], tools: Tools | None) -> bool:
        """Whether the last answer reads the same without its thoughts."""
        if not messages[-1].get("reasoning_content"):
            return False
        silent = {k: v for k, v in messages[-1].items() if k != "reasoning_content"}
        with_it, without = (
            self.text([*messages[:-1], last], tools, generation_prompt=False)
            for last in (messages[-1], silent)
        )
        return with_it == without

    def _dated(self, tools: Tools | None) -> dict[str, Any]:
        """Arguments that give the template this run's day in place of the clock's."""
        asked = re.findall(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')""", self.source)
        days = (
            {form: self.today.strftime(form) for pair in asked for form in pair if form} if self.today else {}
        )
        own = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        return {"chat_template": _TODAY + own, "draftkit_days": days}

    def _as_template_has_it(self, message: Message) -> dict[str, Any]:
        """A message as chat templates expect it: content is one string, arguments of calls are objects,
        reasoning has the name that this template looks for. Raises ValueError for what cannot be shown at
        all."""
        shown = {k: v for k, v in message.items() if v is not None}
        if shown["role"] == "developer" and not self.mentions("developer"):
            shown["role"] = "system"
        shown["content"] = content_text(shown.get("content"))
        shown["tool_calls"] = [call_with_object(call) for call in shown.get("tool_calls") or ()]
        if not shown["tool_calls"]:
            del shown["tool_calls"]
        reasoning = next((v for k in ("reasoning_content", "reasoning") if (v := shown.pop(k, None))), None)
        if reasoning and shown["role"] == "assistant":
            names = self._reasoning_names()
            shown |= dict.fromkeys(names, reasoning)
            if _THINKING_BLOCK.search(self.source):
                text = [{"type": "text", "text": shown["content"]}] if shown["content"] else []
                shown["content"] = [{"type": "thinking", "thinking": reasoning}, *text]
            elif not names and self._thinks_in_content():
                shown["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{shown['content']}"
        return shown

    def _check_fields(self, messages: Sequence[Message]) -> None:
        """Raise TemplateError for a field of DeepSeek-V4's that the template does not look for."""
        there = {name for message in messages for name in fields_of(message)}
        if there and (lost := sorted(there - set(self._looks_for(*FIELDS)))):
            raise TemplateError(
                f"{lost[0]} is a field of DeepSeek-V4's, this template does not look for it: remove it for "
                "other targets than DeepSeek-V4"
            )

    def _reasoning_names(self) -> tuple[str, ...]:
        """The names under which the template looks for an assistant's reasoning."""
        return self._looks_for("reasoning_content", "reasoning", "thinking")

    def _looks_for(self, *names: str) -> tuple[str, ...]:
        """Those of some fields of messages that the template looks for."""
        asked = rf"""(?:\.|\[['"]|get\(['"]|['"])({"|".join(names)})\b"""
        return tuple(sorted(set(re.findall(asked, self.source))))

    def _thinks_in_content(self) -> bool:
        return "</think>" in self.source

    def _written(self, prompt: str, before: Sequence[Message], message: Message, tools: Tools | None) -> str:
        """What stands after the prompt when the assistant has spoken, the rest of the turn's frame included.

        A prompt may open more than history keeps (a thinking part, an empty one): the text to learn begins as
        the prompt does. Raises RewrittenError when the two do not go together.
        """
        whole = self.text([*before, message], tools, generation_prompt=False)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        probed = self.text(
            [*before, {"role": "assistant", "content": _PROBE}], tools, generation_prompt=False
        )
        head = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, probed, strict=False)))
        history = self.text(before, tools, generation_prompt=False)
        opened, rest = prompt[head:], whole[head:]
        # both open a thinking part, and not the same
        other_mode = rest.startswith(opened[: opened.find(">") + 1] or _PROBE)
        agree = prompt[:head].startswith(history) and whole.startswith(prompt[:head])
        if not agree or _PROBE not in probed or other_mode:
            return self._after_rewritten(prompt, whole, before, message, tools)
        tags = _THOUGHT.findall(opened)
        if not tags or tags[-1] == "</think>" or "</think>" in rest:
            return rest
        return self._with_thought(message, rest)

    def _after_rewritten(
        self, prompt: str, whole: str, before: Sequence[Message], message: Message, tools: Tools | None
    ) -> str:
        """The answer where the template writes the history in another way once it is there (gpt-oss without
        thoughts before calls, Mistral without the system's message): it follows what was asked last, and the
        prompt's last words. Raises RewrittenError where these are not the same in both.
        """
        asked = [*before[:-1], {**before[-1], "content": _PROBE}]
        _, there, begins = self.text(asked, tools).rpartition(_PROBE)
        _, here, ends = self.text([*asked, message], tools, generation_prompt=False).rpartition(_PROBE)
        if there and here and prompt.endswith(begins) and whole.endswith(ends):
            if ends.startswith(begins):
                return ends.removeprefix(begins)
            opening = prompt.removeprefix(self.text(before, tools, generation_prompt=False))
            if opening != prompt and ends.count(opening) == 1:
                return ends.partition(opening)[2]
        raise RewrittenError("the chat template writes an answer in another way than its prompt begins one")

    def _with_thought(self, message: Message, rest: str) -> str:
        """The answer after a prompt that has opened the thinking, of which history keeps nothing."""
        content = content_text(message.get("content"))
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if not reasoning and "</think>" in content:
            reasoning = content.split("</think>")[0].split("<think>")[-1]
        if not reasoning:
            raise RewrittenError("the prompt opens a thinking part, and the answer has none")
        return f"{reasoning.strip()}\n</think>\n\n{rest.lstrip()}"


def _has_thought(message: Message) -> bool:
    """Whether a message of the assistant's holds a thinking part, be it an empty one."""
    return bool(message.get("reasoning_content")) or "</think>" in content_text(message.get("content"))


def _template_text(tokenizer: Any) -> str:
    """The text of the chat template, of all where a tokenizer has several by name."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
