"""The target reads texts: what capture writes down and what training takes live.

Shapes: B batch, E tokens read, T tokens of a window, F = K * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from draftkit.errors import FeatureStoreError
from draftkit.features.record import Text
from draftkit.target.interface import Target


class Reader(Protocol):
    """What reads texts: the target in this process, or a server."""

    def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
        """Features [T, F] and last hidden states after the final norm [T, H] of each text's window; the same
        texts together give the same bits. Last hidden states that are not wanted may be [T, 0]."""
        ...


class TargetReader:
    """The target itself, in batches of at most `batch_tokens` tokens, padding included, of texts of similar
    length. Windows of one sample are read once."""

    def __init__(self, target: Target, layers: tuple[int, ...], batch_tokens: int) -> None:
        self._target, self._layers, self._batch_tokens = target, layers, batch_tokens

    def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
        """See `Reader`; on the target's device. Without last hidden states no layer above the features' is
        run."""
        longest = longest_of(texts)
        read: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in batches([(i, len(texts[i].tokens_E)) for i in longest], self._batch_tokens):
            rows = [texts[i].tokens_E for i in batch]
            read |= zip(batch, self._forward(rows, last_hidden), strict=True)
        return cut_windows(texts, longest, read)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Tensor], last_hidden: bool) -> Iterator[tuple[Tensor, Tensor]]:
        length = max(len(row) for row in rows)
        tokens_BE = torch.zeros(len(rows), length, dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens_BE[place, : len(row)] = row
        # causal: padding on the right changes nothing before it
        tokens_BE = tokens_BE.to(self._target.device)
        if not last_hidden:
            features_BEF = self._target.features(tokens_BE, self._layers)
            for place, row in enumerate(rows):
                yield features_BEF[place, : len(row)], features_BEF[place, : len(row), :0]
            return
        output = self._target.forward(tokens_BE, None, self._layers)
        if output.features_BTF is None:
            raise FeatureStoreError("the target returned no features")
        for place, row in enumerate(rows):
            yield output.features_BTF[place, : len(row)], output.last_hidden_BTH[place, : len(row)]


def longest_of(texts: Sequence[Text]) -> list[int]:
    """Of each sample the text that holds its other windows' beginnings."""
    longest: dict[tuple[int, int], int] = {}
    for i, text in enumerate(texts):
        there = longest.setdefault(text.key[:2], i)
        if len(text.tokens_E) > len(texts[there].tokens_E):
            longest[text.key[:2]] = i
    return list(longest.values())


def cut_windows(
    texts: Sequence[Text], longest: Sequence[int], read: Mapping[int, tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Each text's window of what was read of its sample."""
    whole = {texts[i].key[:2]: read[i] for i in longest}
    found = []
    for text in texts:
        features_EF, hidden_EH = whole[text.key[:2]]
        window = slice(text.start, len(text.tokens_E))
        found.append((features_EF[window], hidden_EH[window]))
    return found


def batches(lengths: Sequence[tuple[int, int]], batch_tokens: int) -> list[list[int]]:
    """Numbers of (number, length), shortest first, in batches whose padded size is `batch_tokens` or less; a
    longer one is alone."""
    found: list[list[int]] = []
    for number, length in sorted(lengths, key=lambda item: (item[1], item[0])):
        if not found or (len(found[-1]) + 1) * length > batch_tokens:
            found.append([])
        found[-1].append(number)
    return found
