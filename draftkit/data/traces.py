"""From logs to conversations: read, masked, freed of repetitions, and split by conversation.

A log of requests holds the same conversation again and again, each time a little longer: what is the
beginning of another one is dropped. Conversations that begin with the same request of the user go into the
same split, so that nothing that is evaluated was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftkit.data.conversations import SkippedRows
from draftkit.data.lines import NestedError, json_value
from draftkit.data.log_formats import FORMATS, recognise
from draftkit.data.messages import Conversation, Message
from draftkit.data.row_forms import conversation_of
from draftkit.data.secrets import mask_secrets
from draftkit.errors import DataError
from draftkit.output import as_json, make_folder, write_text
from draftkit.target.deepseek_v4_messages import fields_of

SPLITS = ("train", "validation", "heldout")
_LOOKED_AT = 50  # lines by which a format is recognised
_CALLED = {"tool", "tool_name", "function", "name", "action"}  # keys of a call that is written as JSON
_CALLED_WITH = {"argument", "arguments", "args", "parameters", "input", "action_input"}


@dataclass
class TracesReport:
    """What was read, what was kept of it, and what was dropped and why."""

    formats: dict[str, str] = field(default_factory=dict)  # by file
    rows: int = 0
    invalid: int = 0
    repeated: int = 0
    beginnings: int = 0  # of longer conversations
    without_answer: int = 0
    cut: int = 0  # answers that a limit ended: no end of turn is learnt from them
    masked: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)  # conversations by split
    domains: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in words."""
        masked = ", ".join(f"{count} {kind}" for kind, count in sorted(self.masked.items())) or "none"
        kept = ", ".join(f"{count} {split}" for split, count in self.kept.items())
        dropped = f"{self.repeated} repeated, {self.beginnings} beginnings of longer ones"
        return [
            f"read {self.rows} rows: " + ", ".join(f"{path} ({name})" for path, name in self.formats.items()),
            f"dropped {dropped}, {self.without_answer} without an answer, {self.invalid} invalid",
            f"masked secrets: {masked}; answers that a limit cut: {self.cut}",
            f"kept {kept}; " + ", ".join(f"{name} {count}" for name, count in sorted(self.domains.items())),
        ]


def make_traces(
    paths: Sequence[Path],
    out: Path,
    form: str | None = None,
    validation_share: float = 0.05,
    held_out_share: float = 0.1,
    keep_secrets: bool = False,
) -> tuple[TracesReport, SkippedRows]:
    """Write train.jsonl, validation.jsonl, heldout.jsonl and report.json into `out`; rows that are wrong are
    left out.

    `form` is one of FORMATS; None: recognised file by file. Raises DataError for a file of no known format,
    and when nothing is left.
    """
    report, skipped = TracesReport(), SkippedRows()
    found: list[Conversation] = []
    for path in paths:
        for conversation in _read(path, form, report, skipped):
            masked = conversation if keep_secrets else _masked(conversation, report.masked)
            found.append(
                replace(masked, domain=domain_of(masked.as_dicts())) if masked.domain == path.stem else masked
            )
    report.invalid = skipped.count
    kept = list(_without_repetitions(found, report))
    if not kept:
        raise DataError(
            f"{', '.join(map(str, paths))}: no conversation with an answer is left ({report.lines()[1]})"
        )
    parts: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    for conversation in kept:
        parts[_split_of(conversation, validation_share, held_out_share)].append(conversation)
    make_folder(out)
    for split, conversations in parts.items():
        rows = [_row(c) for c in conversations]
        write_text(out / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    report.kept = {split: len(conversations) for split, conversations in parts.items()}
    report.domains = dict(Counter(c.domain for c in kept))
    write_text(out / "report.json", as_json(asdict(report), indent=1) + "\n")
    return report, skipped


def _read(path: Path, form: str | None, report: TracesReport, skipped: SkippedRows) -> Iterator[Conversation]:
    """Conversations of one log; ids are made of what they say."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a log")
    name = form or recognise(_first_lines(path))
    if name is None:
        looked_for = "; ".join(f"{key}: {what}" for key, (what, _) in FORMATS.items())
        raise DataError(
            f"{path}: is no log of a known format (looked for {looked_for}); name it with --format"
        )
    if name not in FORMATS:
        raise DataError(f"--format {name}: is not known, choose one of {', '.join(FORMATS)}")
    report.formats[str(path)] = name
    lines = _lines(path)
    source: Any = lines if name == "vllm" else _objects(lines, path, skipped)
    for number, row in enumerate(FORMATS[name][1](source), 1):
        report.rows += 1
        where = f"{path}:{number}"
        try:
            conversation = conversation_of({k: v for k, v in row.items() if v != []}, where, path.stem)
        except DataError as error:
            skipped.add(str(error))
            continue
        yield replace(conversation, id=_hash(conversation.messages)[:24])


def _first_lines(path: Path) -> list[str]:
    return [line for line, _ in zip(_lines(path), range(_LOOKED_AT), strict=False)]


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.strip())


def _objects(lines: Iterable[str], path: Path, skipped: SkippedRows) -> Iterator[dict[str, Any]]:
    """The JSON object of each line."""
    for number, line in enumerate(lines, 1):
        try:
            found = json_value(line)
        except NestedError as error:
            skipped.add(f"{path}:{number}: is {error}")
            continue
        except ValueError as error:
            skipped.add(f"{path}:{number}: is not JSON ({str(error)[:80]})")
            continue
        if isinstance(found, dict):
            yield found
        else:
            skipped.add(f"{path}:{number}: is a {type(found).__name__}, must be a JSON object")


def _without_repetitions(found: Sequence[Conversation], report: TracesReport) -> Iterator[Conversation]:
    """Conversations with an answer, each once, and none that is the beginning of another."""
    beginnings: set[str] = set()
    cut: set[str] = set()
    whole: list[str] = []
    for conversation in found:
        digests = list(_prefix_hashes(conversation.messages))
        whole.append(digests[-1])
        beginnings.update(digests[:-1])
        if conversation.cut:
            cut.add(digests[-1])
    seen: set[str] = set()
    for conversation, digest in zip(found, whole, strict=True):
        if digest in seen:
            report.repeated += 1
        elif digest in beginnings:
            report.beginnings += 1
        elif not any(m.role == "assistant" for m in conversation.messages):
            report.without_answer += 1
        else:
            yield _with_cuts(conversation, cut, report)
        seen.add(digest)


def _with_cuts(conversation: Conversation, cut: set[str], report: TracesReport) -> Conversation:
    """The conversation with the answers marked that a limit ended, as the shorter logs of it say: one in the
    middle is not learnt, the last one without an end of turn."""
    ends = [digest in cut for digest in _prefix_hashes(conversation.messages)]
    marked = zip(conversation.messages, ends, strict=True)
    messages = [replace(m, weight=0) if ended else m for m, ended in marked]
    messages[-1] = conversation.messages[-1]
    report.cut += sum(m.role == "assistant" and m.weight == 0 for m in messages) + ends[-1]
    reason = "length" if ends[-1] else conversation.finish_reason
    return replace(conversation, messages=tuple(messages), finish_reason=reason)


def _prefix_hashes(messages: Sequence[Message]) -> Iterator[str]:
    """A digest of the first message, the first two, ...; ids of calls, which differ from log to log, do not
    count. DeepSeek-V4's fields do, where a message has them."""
    digest = hashlib.sha256()
    for m in messages:
        calls = [c["function"] for c in m.tool_calls]
        own = [said] if (said := fields_of(m.as_dict())) else []
        digest.update(json.dumps([m.role, m.content or "", calls, *own], ensure_ascii=False).encode())
        yield digest.hexdigest()


def _hash(messages: Sequence[Message]) -> str:
    return list(_prefix_hashes(messages))[-1]


def _split_of(conversation: Conversation, validation_share: float, held_out_share: float) -> str:
    """The split, by the user's first request: the same on every machine and in every order."""
    first = conversation.first_turn().messages[-1].content or ""
    place = int.from_bytes(hashlib.sha256(first.encode()).digest()[:6]) / 2**48
    if place < held_out_share:
        return "heldout"
    return "validation" if place < held_out_share + validation_share else "train"


def domain_of(messages: Iterable[Mapping[str, Any]]) -> str:
    """tool calls, reasoning, code or prose: what the assistant's messages (OpenAI's, as dicts) hold."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if any(m.get("tool_calls") or _is_call(m.get("content") or "") for m in answers):
        return "tool calls"
    if any(m.get("reasoning_content") or "</think>" in (m.get("content") or "") for m in answers):
        return "reasoning"
    return "code" if any("```" in (m.get("content") or "") for m in answers) else "prose"


def _is_call(content: str) -> bool:
    """Whether an answer calls a tool in its text: by a tag, or as JSON alone, as agents ask for where a
    template shows no tools."""
    if "<tool_call>" in content:
        return True
    try:
        said = json_value(content) if content.lstrip().startswith("{") else None
    except ValueError:
        return False
    return isinstance(said, dict) and bool(_CALLED & said.keys()) and bool(_CALLED_WITH & said.keys())


def _masked(conversation: Conversation, counts: dict[str, int]) -> Conversation:
    return replace(conversation, messages=tuple(_masked_message(m, counts) for m in conversation.messages))


def _masked_message(message: Message, counts: dict[str, int]) -> Message:
    calls = []
    for call in message.tool_calls:
        function = call["function"]
        calls.append(
            {**call, "function": {**function, "arguments": mask_secrets(function["arguments"], counts)}}
        )
    return replace(
        message,
        content=mask_secrets(message.content, counts) if message.content else message.content,
        reasoning=mask_secrets(message.reasoning, counts) if message.reasoning else None,
        tool_calls=tuple(calls),
        response_format=message.response_format and _masked_format(message.response_format, counts),
    )


def _masked_format(form: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """A response format with each of its texts masked."""
    masked = lambda text: json.dumps(mask_secrets(json.loads(text[0]), counts))  # noqa: E731
    found: dict[str, Any] = json.loads(re.sub(r'"(?:[^"\\]|\\.)*"', masked, json.dumps(form)))
    return found


def _row(conversation: Conversation) -> dict[str, Any]:
    row: dict[str, Any] = {"id": conversation.id, "domain": conversation.domain}
    row |= {"messages": conversation.as_dicts()} | ({"finish_reason": "length"} if conversation.cut else {})
    return row | ({"tools": list(conversation.tools)} if conversation.tools else {})
