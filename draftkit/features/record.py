"""A record of a feature store as bytes, and back.

    text       uint32 [E]         token << 1 | loss mask; all tokens that the target has read, window or not
    features   dtype [C, K, H]    from the window's first token to its last anchor
    scales     float32 [C, K]     fp8 only
    targets    dtype [L, H]       last hidden states before tokens that the target wrote
    scales     float32 [L]        fp8 only

one after the other, little-endian. C and L follow from the mask. fp8 is e4m3 with one scale per token and
layer, so that a layer with large values costs the others nothing.

Shapes: E tokens read, T = E - start tokens of the window, C context places, L places with a target, K layers,
H hidden size, F = K * H.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftkit.errors import FeatureStoreError
from draftkit.features.source import FeatureSample, context_of, target_places

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": FP8}
NO_FEATURES = "none"  # the dtype of a store that holds text alone

if sys.byteorder != "little":
    raise ImportError("feature stores are little-endian; this machine is not")


@dataclass(frozen=True)
class Text:
    """Tokens int64 [E] as the target reads them, mask bool [E]; what is learnt from begins at `start`.

    `key` is (conversation, sample, window): its number among the store's conversations, which sample of that,
    which window of the sample.
    """

    key: tuple[int, int, int]
    id: str
    domain: str
    tokens_E: Tensor
    loss_mask_E: Tensor
    start: int = 0

    @property
    def mask(self) -> Tensor:
        """The window's loss mask, bool [T]."""
        return self.loss_mask_E[self.start :]

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes as arrays: torch would open a file for each tensor."""
        arrays = self.tokens_E.numpy().astype(np.uint32), self.loss_mask_E.numpy()
        return _text_of_arrays, (self.key, self.id, self.domain, *arrays, self.start)


def _text_of_arrays(
    key: tuple[int, int, int], name: str, domain: str, ids: NDArray[Any], mask: NDArray[Any], start: int
) -> Text:
    tokens_E = torch.from_numpy(ids.astype(np.int64))
    return Text(key, name, domain, tokens_E, torch.from_numpy(mask.copy()), start)


@dataclass(frozen=True)
class RecordForm:
    """What records hold: numbers of `dtype` (float32, bfloat16, fp8, none) for `layers` layers."""

    dtype: str
    layers: int
    hidden_size: int

    @property
    def read_dtype(self) -> torch.dtype:
        """Of what is read: fp8 comes back as bfloat16."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def vector_bytes(self) -> int:
        """Of one layer at one token, its scale included."""
        if self.dtype == NO_FEATURES:
            return 0
        return self.hidden_size * STORED[self.dtype].itemsize + (4 if self.dtype == "fp8" else 0)

    def bytes_of(self, tokens_read: int, context: int, targets: int) -> int:
        """Of a record, by its numbers of tokens."""
        return 4 * tokens_read + (context * self.layers + targets) * self.vector_bytes()

    def record_bytes(self, text: Text) -> int:
        """Of the record of a text."""
        return self.bytes_of(len(text.tokens_E), context_of(text.mask), len(target_places(text.mask)))

    def encode(self, text: Text, features_TF: Tensor | None, last_hidden_TH: Tensor | None) -> bytes:
        """The record; features and last hidden states of the window, on any device."""
        packed = (text.tokens_E.numpy() << 1) | text.loss_mask_E.numpy()
        parts = [packed.astype(np.uint32).tobytes()]
        if features_TF is not None and last_hidden_TH is not None and self.dtype != NO_FEATURES:
            context_CKH = features_TF[: context_of(text.mask)].unflatten(-1, (self.layers, self.hidden_size))
            places_L = target_places(text.mask).to(last_hidden_TH.device)
            parts += [*self._vectors(context_CKH), *self._vectors(last_hidden_TH[places_L])]
        return b"".join(parts)

    def decode(self, record: bytes, tokens_read: int, start: int, name: str, domain: str) -> FeatureSample:
        """The sample of a record. Raises FeatureStoreError when its size is not what its mask says."""
        tokens_E, mask_E = decode_text(record, tokens_read)
        tokens_T, mask_T = tokens_E[start:], mask_E[start:]
        context, places_L = context_of(mask_T), target_places(mask_T)
        if len(record) != self.bytes_of(tokens_read, context, len(places_L)):
            raise FeatureStoreError(
                f"record {name!r} has {len(record)} bytes, which its mask does not explain"
            )
        at = 4 * tokens_read
        features_TF = torch.zeros(len(tokens_T), self.layers * self.hidden_size, dtype=self.read_dtype)
        last_hidden_TH = torch.zeros(len(tokens_T), self.hidden_size, dtype=self.read_dtype)
        if self.dtype != NO_FEATURES:
            middle = at + context * self.layers * self.vector_bytes()
            features_TF[:context] = self._read(record[at:middle], context * self.layers).view(context, -1)
            last_hidden_TH[places_L] = self._read(record[middle:], len(places_L))
        return FeatureSample(name, domain, tokens_T, mask_T, features_TF, last_hidden_TH)

    def rounded(self, values: Tensor) -> Tensor:
        """Vectors [..., n * H] as a store would give them back."""
        if self.dtype != "fp8":
            return values.to(self.read_dtype)
        numbers, scales = quantise(values.unflatten(-1, (-1, self.hidden_size)))
        return (numbers.float() * scales[..., None]).flatten(-2).to(self.read_dtype)

    def _vectors(self, values: Tensor) -> list[bytes]:
        """Vectors [..., H] as bytes; fp8 with its scales."""
        if self.dtype != "fp8":
            return [_raw(values.to("cpu", STORED[self.dtype]))]
        numbers, scales = quantise(values)
        return [_raw(numbers.cpu()), _raw(scales.cpu())]

    def _read(self, part: bytes, count: int) -> Tensor:
        """`count` vectors [count, H]."""
        if not count:
            return torch.zeros(0, self.hidden_size, dtype=self.read_dtype)
        size = count * self.hidden_size * STORED[self.dtype].itemsize
        numbers = torch.frombuffer(bytearray(part[:size]), dtype=STORED[self.dtype]).view(count, -1)
        if self.dtype != "fp8":
            return numbers
        scales = torch.frombuffer(bytearray(part[size:]), dtype=torch.float32)
        return (numbers.float() * scales[:, None]).to(self.read_dtype)


def decode_text(record: bytes, tokens_read: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 [E] and mask bool [E] of a record."""
    packed = np.frombuffer(record, np.uint32, tokens_read)
    return torch.from_numpy((packed >> 1).astype(np.int64)), torch.from_numpy((packed & 1).astype(bool))


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [..., H] and float32 scales [...], one per vector: its largest value becomes the largest
    number."""
    values = values.float()
    scales = (values.abs().amax(-1) / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales[..., None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scales


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def windows(sample_mask: Tensor, limit: int) -> list[tuple[int, int, int]]:
    """(start, end, first) of the windows of at most `limit` tokens in which a sample is learnt, bool [T] its
    mask: tokens `first` to `end` of the mask count in this one. Each token that the target wrote counts in
    one; before it lies a quarter of a window of context where there is as much.
    """
    length = len(sample_mask)
    if length <= limit:
        return [(0, length, 0)]
    found = []
    first = 0
    while (left := sample_mask[first:].nonzero()).numel():
        first += int(left[0])
        start = max(0, min(first - limit // 4, length - limit))
        end = start + limit
        found.append((start, end, first))
        first = end if end == length else end - 1  # the last one may be the next window's first anchor
        if end == length:
            break
    return found
