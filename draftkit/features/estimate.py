"""What a feature store will take, before it is made: from a target's sizes, and numbers of tokens that are
assumed or counted on some of the conversations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from draftkit.data.messages import Conversation
from draftkit.features.index import Key, Record, index_line
from draftkit.features.record import RecordForm, Text
from draftkit.features.source import context_of, target_places
from draftkit.features.texts import PART, Chunk, rendered
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.prompt_format import PromptFormat

SAMPLED = 2000  # conversations that are rendered, at most


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of a set of samples. `read`: tokens that the target reads, windows' beginnings included;
    `context`: those whose features are kept; `targets`: those whose last hidden states are; `index`: bytes of
    lines in the index."""

    conversations: float = 0
    samples: float = 0
    read: float = 0
    context: float = 0
    targets: float = 0
    index: float = 0

    def store_bytes(self, form: RecordForm) -> int:
        """Of a store of them."""
        vectors = self.context * form.layers + self.targets
        return round(4 * self.read + vectors * form.vector_bytes() + self.index)

    def scaled(self, factor: float) -> TokenCounts:
        """The same of more, or of fewer, such conversations."""
        return TokenCounts(*(factor * value for value in vars(self).values()))


def assumed_counts(conversations: int, tokens: int, answer_share: float, max_length: int) -> TokenCounts:
    """Of conversations of one length whose last part is the answer; longer ones than a window are in windows,
    a quarter of each read again."""
    answer = max(1, round(answer_share * tokens))
    if tokens <= max_length:
        read, kept, samples = float(tokens), float(tokens - 2), 1.0
    else:
        samples = -(-answer // (max_length - max_length // 4))
        kept = samples * (max_length - 2)
        read = samples * tokens - sum(max_length * 3 // 4 * i for i in range(int(samples)))
    line = len(index_line(_record((conversations, 0, 0), "conversation", "chat", 0, 0)))
    counts = TokenCounts(1, samples, read, kept, answer, samples * line)
    return replace(counts.scaled(conversations), conversations=conversations)


def counted(
    conversations: Iterable[Conversation],
    total: int,
    prompt_format: PromptFormat,
    info: TargetInfo,
    settings: CaptureSettings,
) -> TokenCounts:
    """Of `total` conversations, of which every so-many-th is rendered, SAMPLED at most."""
    step = max(1, -(-total // SAMPLED))
    found, taken = TokenCounts(), 0
    for number, conversation in enumerate(conversations):
        if number % step == 0:
            chunk = Chunk(number // PART, number, (conversation,), "")
            texts = rendered(chunk, prompt_format, info, settings).texts
            taken += 1
            found = _sum([found, *map(_counts_of, texts)])
    return replace(found.scaled(total / max(1, taken)), conversations=total)


def _counts_of(text: Text) -> TokenCounts:
    line = len(index_line(_record(text.key, text.id, text.domain, text.start, text.key[0] // PART)))
    context, targets = context_of(text.mask), len(target_places(text.mask))
    return TokenCounts(0, 1, len(text.tokens_E), context, targets, line)


def _record(key: Key, name: str, domain: str, start: int, part: int) -> dict[str, object]:
    return Record(key, part, (0, 0, 2**29), 10**6, 1000, start, name, domain, 2**31, "0" * 64).note()


def _sum(counts: list[TokenCounts]) -> TokenCounts:
    return TokenCounts(*map(sum, zip(*(vars(c).values() for c in counts), strict=True)))
