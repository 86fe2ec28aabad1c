"""Mixtures of data sets: by preset, hub id or file, with weights, caps in tokens, and nothing twice.

A mixture is a YAML file:

    sources:
      - {preset: open-perfectblend, weight: 3, max_tokens: 200_000_000}
      - {hub: HuggingFaceH4/ultrachat_200k, revision: main, split: train_sft}
      - {path: mine.jsonl, weight: 1}
    validation: held.jsonl      # its conversations are kept out of the mixture
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from draftkit.data.conversations import SkippedRows, iterate_conversations
from draftkit.data.lines import json_line
from draftkit.data.messages import Conversation
from draftkit.data.row_forms import conversation_of
from draftkit.errors import ConfigError, DataError
from draftkit.output import naming

_BYTES_PER_TOKEN = 4  # about, of any text: caps need no exact count


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub."""

    hub: str
    split: str = "train"
    config: str | None = None


PRESETS = {
    "open-perfectblend": HubSet("mlabonne/open-perfectblend"),  # what the paper trains on
    "sharegpt": HubSet("Aeala/ShareGPT_Vicuna_unfiltered"),
    "ultrachat": HubSet("HuggingFaceH4/ultrachat_200k", "train_sft"),
    "magpie": HubSet("Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered"),
    "nemotron-chat": HubSet("nvidia/Nemotron-Post-Training-Dataset-v2", "chat"),
    "nemotron-code": HubSet("nvidia/Nemotron-Post-Training-Dataset-v2", "code"),
    "nemotron-math": HubSet("nvidia/Nemotron-Post-Training-Dataset-v2", "math"),
    "toolace": HubSet("Team-ACE/ToolACE"),
    "hermes-tools": HubSet("NousResearch/hermes-function-calling-v1", config="func_calling"),
}


class Source(BaseModel):
    """One part of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    preset: str | None = None
    hub: str | None = None
    path: str | None = None
    revision: str | None = None
    split: str | None = None
    config: str | None = None
    domain: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if sum(bool(place) for place in (self.preset, self.hub, self.path)) != 1:
            raise ValueError("give one of preset, hub and path")
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known, choose one of {', '.join(PRESETS)}")
        return self

    @property
    def name(self) -> str:
        """What it is called in ids and reports."""
        return self.preset or self.hub or Path(str(self.path)).stem


class Mixture(BaseModel):
    """Parts, and a file of conversations that must not be among them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sources: Annotated[list[Source], Field(min_length=1)]
    validation: str | None = None


@dataclass
class MixReport:
    """Conversations and tokens (about) by source, and how many were left out as there before."""

    conversations: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    repeated: int = 0


def read_mixture(path: Path) -> Mixture:
    """Raises ConfigError that names the field."""
    try:
        return Mixture.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a mixture ({' '.join(str(error).split())[:120]})"
        ) from error


def mix(
    mixture: Mixture, out: Path, limit: int | None = None, skipped: SkippedRows | None = None
) -> MixReport:
    """Write a mixture's conversations into `out`, interleaved by weight until `limit` of them are there or
    all sources end.

    A conversation that another source, or the validation file, has already is left out. Raises DataError for
    rows that are wrong, unless they go into `skipped`.
    """
    report, seen = MixReport(), set[bytes]()
    if mixture.validation:
        seen |= {_digest(c) for c in iterate_conversations([Path(mixture.validation)])}
    with naming(out), out.open("wb") as file:
        for name, conversation in _interleaved(mixture.sources, seen, report, skipped):
            row = {"id": conversation.id, "domain": conversation.domain, "messages": conversation.as_dicts()}
            file.write(json_line(row | ({"tools": list(conversation.tools)} if conversation.tools else {})))
            report.conversations[name] = report.conversations.get(name, 0) + 1
            report.tokens[name] = report.tokens.get(name, 0) + _tokens(conversation)
            if limit and sum(report.conversations.values()) >= limit:
                break
    return report


def _interleaved(
    sources: Iterable[Source], seen: set[bytes], report: MixReport, skipped: SkippedRows | None
) -> Iterator[tuple[str, Conversation]]:
    """(source, conversation), always from the source that has given least for its weight."""
    running = {i: (s, _conversations(s, skipped)) for i, s in enumerate(sources)}
    given, tokens = dict.fromkeys(running, 0.0), dict.fromkeys(running, 0)
    while running:
        place = min(running, key=lambda i: (given[i] / running[i][0].weight, i))
        source, rows = running[place]
        conversation = next(rows, None)
        if conversation is None or (source.max_tokens is not None and tokens[place] >= source.max_tokens):
            del running[place]
            continue
        digest = _digest(conversation)
        if digest in seen:
            report.repeated += 1
            continue
        seen.add(digest)
        given[place] += 1
        tokens[place] += _tokens(conversation)
        yield source.name, replace(conversation, id=f"{source.name}/{conversation.id}")


def _conversations(source: Source, skipped: SkippedRows | None) -> Iterator[Conversation]:
    found = iterate_conversations([Path(source.path)], skipped) if source.path else _of_hub(source, skipped)
    for conversation in found:
        yield replace(conversation, domain=source.domain) if source.domain else conversation


def _of_hub(source: Source, skipped: SkippedRows | None) -> Iterator[Conversation]:
    """Rows of a hub data set as they stream in."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source.name}: hub data sets are read through `datasets`; pip install 'draftkit[data]'"
        ) from error
    about = PRESETS[source.preset] if source.preset else HubSet(str(source.hub))
    split, config = source.split or about.split, source.config or about.config
    try:
        rows = load_dataset(about.hub, config, split=split, revision=source.revision, streaming=True)
    except Exception as error:  # the hub, its files and `datasets` raise whatever they like
        raise DataError(f"{about.hub}: cannot be loaded ({' '.join(str(error).split())[:160]})") from error
    for number, row in enumerate(rows, 1):
        try:
            yield conversation_of(dict(row), f"{about.hub}:{number}", source.name)
        except DataError as error:
            if skipped is None:
                raise
            skipped.add(str(error))


def _digest(conversation: Conversation) -> bytes:
    """Of what is asked: the same question with another answer is the same."""
    asked = [m for m in conversation.messages if m.role in ("user", "tool") or m.asks]
    text = json.dumps([[m.content, m.task, m.prefix] for m in asked], ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()[:8]


def _tokens(conversation: Conversation) -> int:
    """About how many tokens it has."""
    return sum(len((m.content or "").encode()) for m in conversation.messages) // _BYTES_PER_TOKEN
