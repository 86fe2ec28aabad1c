"""From conversations to the texts of a store, part by part: a part is some conversations, what is learnt from
them, and what was left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from draftkit.data.messages import Conversation
from draftkit.data.samples import Sample, SampleCounts, samples_of
from draftkit.features.record import Text, windows
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.prompt_format import PromptFormat

PART = 256  # conversations


@dataclass(frozen=True)
class Chunk:
    """Conversations `first` and on, not yet rendered; `digest` says which they are."""

    number: int
    first: int
    conversations: tuple[Conversation, ...]
    digest: str


@dataclass
class PartTexts:
    """What became of a chunk."""

    texts: list[Text]
    counts: SampleCounts = field(default_factory=SampleCounts)
    too_long: int = 0
    tokens: int = 0

    def note(self) -> dict[str, Any]:
        """As its line in the index says it."""
        counts = asdict(self.counts) | {"unshown": dict(self.counts.unshown)}
        return {"counts": counts, "too_long": self.too_long, "tokens": self.tokens}


def chunks(conversations: Iterable[Conversation], number: int, first: int) -> Iterator[Chunk]:
    """Cut what is read into chunks of PART, the first one with these numbers."""
    held: list[Conversation] = []
    for conversation in conversations:
        held.append(conversation)
        if len(held) == PART:
            yield _chunk(held, number, first)
            number, first, held = number + 1, first + PART, []
    if held:
        yield _chunk(held, number, first)


def _chunk(held: list[Conversation], number: int, first: int) -> Chunk:
    digest = hashlib.sha256("\0".join(map(repr, held)).encode("utf-8", "surrogatepass"))
    return Chunk(number, first, tuple(held), digest.hexdigest())


def rendered(
    chunk: Chunk, prompt_format: PromptFormat, info: TargetInfo, settings: CaptureSettings
) -> PartTexts:
    """The texts of a chunk. Samples that are longer than the target's own context are left out and counted;
    those longer than `settings.max_length` are cut into windows."""
    part = PartTexts([])
    for place, conversation in enumerate(chunk.conversations):
        found = samples_of([conversation], prompt_format, info.vocab_size, part.counts, settings.cut_answers)
        for number, sample in enumerate(found):
            if len(sample.tokens) > max(info.max_length, settings.max_length):
                part.too_long += 1
                continue
            part.texts += _windows_of(sample, (chunk.first + place, number), settings.max_length)
    part.tokens = sum(len(text.mask) for text in part.texts)
    return part


def _windows_of(sample: Sample, key: tuple[int, int], limit: int) -> list[Text]:
    tokens_T, mask_T = torch.tensor(sample.tokens), torch.tensor(sample.loss_mask)
    cut = windows(mask_T, limit)
    texts = []
    for number, (start, end, first) in enumerate(cut):
        mask_E = mask_T[:end].clone()
        mask_E[:first] = False
        name = sample.id if len(cut) == 1 else f"{sample.id}@{start}"
        texts.append(Text((*key, number), name, sample.domain, tokens_T[:end], mask_E, start))
    return texts


def added(notes: Iterable[dict[str, Any]]) -> tuple[SampleCounts, int, int]:
    """Counts, samples that were too long and tokens of several parts."""
    counts, too_long, tokens = SampleCounts(), 0, 0
    for note in notes:
        for name, value in note["counts"].items():
            if name == "unshown":
                counts.unshown.update(Counter(value))
            else:
                setattr(counts, name, getattr(counts, name) + value)
        too_long += note["too_long"]
        tokens += note["tokens"]
    return counts, too_long, tokens
