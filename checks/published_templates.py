"""Chat templates as they were published: what draftkit shows a target, learns and takes apart is what the
template writes.

    python -m checks.published_templates --templates llama.cpp/models/templates --only 'Qwen3-0|gpt-oss'

`--templates` is a folder with files of one template each (`*.jinja`), as llama.cpp ships them. Each is given
conversations with tools and thoughts where it has them, in each of its thinking modes, with the embedded
tokenizer, to which the template's special tokens are added, and counted:

- rendered: texts that equal `apply_chat_template(messages, tools=..., switches)`
- found: answers (end of turn included) that are what the template writes after its prompt
- exact: records by `generate`, of the very ids that were asked and answered, each fourth answer cut, that
  capture turns into just these ids, with a mask of just the answered ones
- taken apart: answers that, streamed in pieces, become the thoughts, words and calls that they were made of

Prints a line for each template and mode, and one line of JSON; exit code 1 when a number is not full. A
template may refuse a conversation (as when it takes no two calls at once): both sides must refuse it then.
Thoughts that a template does not show are not asked for, nor are calls in a form that no family of
`draftkit.target.answer_stream` has.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from checks.chats import conversations
from draftkit.data.answers import Answer, Answers, Question
from draftkit.data.conversations import iterate_conversations, iterate_rows
from draftkit.data.generate import generate_file
from draftkit.data.messages import Conversation
from draftkit.data.records import made_with
from draftkit.data.samples import SampleCounts, samples_of
from draftkit.settings import GenerateSettings
from draftkit.target.answer_stream import AnswerDelta
from draftkit.target.place import EMBEDDED
from draftkit.target.prompt_format import RewrittenError, TemplateError
from draftkit.target.template_format import PARALLEL, TemplateFormat
from draftkit.target.tokenizer import load_tokenizer

_SPECIAL = re.compile(
    r"<[|｜][^\s|｜<>]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|</s>|\[/?[A-Z_]{3,}\]"
)
_THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")
SETTINGS = GenerateSettings(max_new_tokens=4096)
Message = dict[str, Any]


class Target(Answers):
    """Says what it is known to say after so many answers; each fourth answer is cut in half."""

    room = 1

    def __init__(self, says: Sequence[tuple[int, ...]]) -> None:
        self._says, self._asked = says, list[Question]()
        self.written: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Take it."""
        self._asked.append(question)

    def finished(self) -> list[tuple[str, Answer]]:
        """The answer to what was asked last."""
        question = self._asked.pop()
        ids = self._says[sum(m["role"] == "assistant" for m in question.messages)]
        cut = len(ids) > 1 and sum(question.prompt_ids) % 4 == 0
        ids = ids[: len(ids) // 2] if cut else ids
        self.written.append((question.prompt_ids, ids))
        return [(question.key, Answer(ids, "length" if cut else "stop"))]


def with_thought(message: Message, thought: str, form: str) -> Message:
    """A message that has a thought in the form that its template knows."""
    said = message["content"]
    if form == "blocks":
        blocks = [
            {"type": "thinking", "thinking": thought},
            *([{"type": "text", "text": said}] if said else []),
        ]
        return {**message, "content": blocks}
    if form == "content":
        return {**message, "content": f"<think>\n{thought}\n</think>\n\n{said}"}
    return {**message, **dict.fromkeys(_THOUGHT_NAMES, thought)}


def thought_form(shown: TemplateFormat) -> str:
    """In which form a template takes thoughts: as a field, in blocks of the content, in its text."""
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    answers: list[Message] = [{"content": "b"}, {"content": "", "tool_calls": [call]}]
    for form, answer in product(("fields", "blocks"), answers):
        said = with_thought({"role": "assistant", **answer}, "c1c2c3", form)
        text = rendered(shown, [{"role": "user", "content": "a"}, said], (), False) or ""
        if "c1c2c3" in text and "thinking'" not in text and 'thinking"' not in text:  # not the block as it is
            return form
    return "content" if "</think>" in shown.source else "fields"


def plain(message: Message, form: str) -> Message:
    """A message of OpenAI's as the documentation of `apply_chat_template` wants it."""
    shown = {**message, "content": message["content"] or ""}
    if thought := shown.pop("reasoning_content", None):
        shown = with_thought(shown, thought, form)
    if calls := shown.get("tool_calls"):
        read = [c["function"] | {"arguments": json.loads(c["function"]["arguments"])} for c in calls]
        shown["tool_calls"] = [c | {"function": f} for c, f in zip(calls, read, strict=True)]
    return shown


def rendered(shown: TemplateFormat, messages: Sequence[Message], tools: Any, begins: bool) -> str | None:
    """What Transformers makes of messages that are in its form; None where the template refuses them."""
    try:
        return str(
            shown.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=begins,
                **shown.switches,
            )
        )
    except Exception:  # a template is a program
        return None


def count_rendered(
    shown: TemplateFormat, messages: list[Message], as_there: list[Message], tools: Any, counts: Counter[str]
) -> bool:
    """Compare both sides; whether the template takes the conversation."""
    try:
        own: str | None = shown.text(messages, tools)
    except TemplateError:
        own = None
    there = rendered(shown, as_there, tools, True)
    counts["conversations"] += there is not None
    counts["refused"] += there is None
    counts["rendered"] += own == there is not None
    counts["refused by one"] += (own is None) != (there is None)
    return there is not None and own is not None


def count_found(
    shown: TemplateFormat, messages: list[Message], as_there: list[Message], tools: Any, counts: Counter[str]
) -> list[tuple[int, ...]] | None:
    """Compare answers with what the template writes; the answers' ids, or None where it writes an answer in
    another way than its prompt begins one."""
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    try:
        turns = shown.turns(messages, tools)
    except (RewrittenError, TemplateError):
        counts["rewritten"] += len(places)
        return None
    counts["unlearnt"] += len(places) - len(turns)
    if len(places) != len(turns):
        return None
    for place, turn in zip(places, turns, strict=True):
        prompt = rendered(shown, as_there[:place], tools, True) or ""
        whole = rendered(shown, as_there[: place + 1], tools, False) or ""
        counts["answers"] += 1
        answer = shown.tokenizer.decode(turn.answer_ids).rstrip()
        if whole.startswith(prompt):
            said = whole[len(prompt) :].rstrip()
        else:  # once the answer is there, the template writes what was before it in another way
            counts["after another history"] += 1
            thought = f"{messages[place].get('reasoning_content')}\n</think>\n\n"
            kept = answer.removeprefix(thought) if prompt.rstrip().endswith("<think>") else answer
            said = answer if whole.rstrip().endswith(kept) else ""
        prompt_ids = shown.encode(prompt)
        good = said == answer and turn.prompt_ids[: len(prompt_ids)] == prompt_ids
        counts["found"] += good
    return [turn.answer_ids for turn in turns]


def count_exact(
    shown: TemplateFormat,
    row: Message,
    says: Sequence[tuple[int, ...]],
    counts: Counter[str],
    work: Path,
) -> None:
    """Let a target that says these ids answer, and read the record as capture does."""
    asked, out = work / "asked.jsonl", work / "answers.jsonl"
    asked.write_text(json.dumps(row) + "\n", "utf-8")
    target = Target(says)

    def read(first: int) -> Iterator[Conversation]:
        return iterate_rows([asked], first=first)

    generate_file(target, shown, read, out, SETTINGS, made_with(shown, "known", (), SETTINGS))
    samples = list(samples_of(iterate_conversations([out]), shown, len(shown.tokenizer), SampleCounts()))
    for file in work.glob("*"):
        file.unlink()
    learnt = sum(sum(sample.loss_mask) for sample in samples)
    there = 0
    for prompt_ids, ids in target.written:
        begin, end = len(prompt_ids), len(prompt_ids) + len(ids)
        there += any(s.tokens[:end] == prompt_ids + ids and all(s.loss_mask[begin:end]) for s in samples)
    counts["generated"] += len(target.written)
    counts["exact"] += there if learnt == sum(len(ids) for _, ids in target.written) else 0


def count_taken_apart(
    shown: TemplateFormat, messages: list[Message], tools: Any, counts: Counter[str], chance: random.Random
) -> None:
    """Stream the answers in pieces, and compare what comes out with what they were made of."""
    answers = [m for m in messages if m["role"] == "assistant"]
    for message, turn in zip(answers, shown.turns(messages, tools), strict=True):
        hidden = not shown.marks_are_special
        text = shown.tokenizer.decode(turn.answer_ids, skip_special_tokens=hidden)
        reader, found = shown.reader(turn.prompt_ids), AnswerDelta()
        while text:
            size = chance.randint(1, 9)
            found, text = found + reader.add(text[:size]), text[size:]
        found += reader.finish()
        calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found.tool_calls]
        wanted = message.get("tool_calls") or []
        right = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in wanted]
        counts["streamed"] += 1
        thought = message.get("reasoning_content", "")
        if thought not in shown.tokenizer.decode(turn.answer_ids):
            counts["thoughts not shown"] += 1
            thought = ""
        words = message["content"] or ""
        counts["taken apart"] += (found.reasoning, found.content.strip(), calls) == (thought, words, right)


def checked(template: str, switches: dict[str, Any], count: int, work: Path) -> Counter[str]:
    """The numbers of one template in one mode."""
    tokenizer: Any = load_tokenizer(str(EMBEDDED))
    marks = sorted({*_SPECIAL.findall(template)} - set(tokenizer.all_special_tokens))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": marks})
    tokenizer.chat_template = template
    shown = TemplateFormat(tokenizer, switches)
    counts: Counter[str] = Counter()
    chance, form = random.Random(0), thought_form(shown)
    with_tools = shown.mentions("tools") and shown.mentions("tool_calls")
    thinks = switches.get("enable_thinking", True) and shown.style.thinks
    for at_once in (2, 1):  # some take one call at a time
        counts.clear()
        for number, (messages, tools) in enumerate(conversations(count, with_tools, thinks, at_once)):
            as_there = [plain(m, form) for m in messages]
            if not count_rendered(shown, messages, as_there, tools, counts):
                continue
            counts["parallel calls not shown"] += PARALLEL in shown.unshown(messages, tools)
            says = count_found(shown, messages, as_there, tools, counts)
            if says is None:
                continue
            row = {"id": str(number), "messages": messages, "tools": tools}
            count_exact(shown, row, says, counts, work)
            if shown.style.calls or not with_tools:
                count_taken_apart(shown, messages, tools, counts, chance)
        if not (counts["refused"] or counts["parallel calls not shown"]):
            break
    return counts


FULL = (
    ("rendered", "conversations"),
    ("found", "answers"),
    ("exact", "generated"),
    ("taken apart", "streamed"),
)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--only", default="", help="a regular expression for names of files")
    given = parser.parse_args()
    files = sorted(f for f in given.templates.rglob("*.jinja") if re.search(given.only, f.name))
    if not files:
        sys.exit(f"{given.templates}: holds no *.jinja of such a name")
    told: dict[str, dict[str, int]] = {}
    short: list[str] = []
    for file in files:
        source = file.read_text("utf-8")
        modes: list[dict[str, Any]] = [{}]
        if "enable_thinking" in source:
            modes = [{"enable_thinking": True}, {"enable_thinking": False}]
        for switches in modes:
            name = " ".join([file.stem, *(f"{k}={v}" for k, v in switches.items())])
            with tempfile.TemporaryDirectory() as work:
                counts = checked(source, switches, given.conversations, Path(work))
            told[name] = dict(counts)
            missed = [one for one, all_of in FULL if counts[one] != counts[all_of]]
            if missed or counts["refused by one"] or counts["conversations"] == 0:
                short.append(name)
            numbers = ", ".join(f"{one} {counts[one]}/{counts[all_of]}" for one, all_of in FULL)
            others = {k: v for k, v in counts.items() if v and k not in {x for pair in FULL for x in pair}}
            print(f"{name}: {numbers}" + "".join(f", {k} {v}" for k, v in others.items()), file=sys.stderr)
    print(json.dumps({"templates": len(files), "modes": len(told), "short": short}))
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
