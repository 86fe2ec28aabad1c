"""Hidden states that speculators' `prepare_data.py` and `data_generation_offline.py` stored, as a source.

    state.json, *.arrow               a data set of Hugging Face: input_ids [T], loss_mask [T] of each sample
    hidden_states/hs_N.safetensors    of sample N, as hs-connectors reads it: token_ids [T], hidden_states
                                      [T, K + 1, H], also in fp8; the last layer's before the final norm

The files do not say of which target and which layers they are: what differs in vocabulary, sizes or number
of layers is refused when they are opened, anything else by `probe`. They hold no checksums.

Shapes: T tokens, F = K * H features of K layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from draftkit.errors import ConfigError, FeatureStoreError, reason
from draftkit.features.probe import compare_states
from draftkit.features.source import DOMAIN, FeatureSample, OthersSamples, empty_sample
from draftkit.features.vllm import Wanted, connector_files
from draftkit.target.interface import Target

DATA_SET = "state.json"  # of a data set that was saved
STATES = "hidden_states"
LOOKED_AT = 16  # samples that are read before a run begins
PROBED_TOKENS = 128  # of a sample
AGAIN = "run speculators' data_generation_offline.py on this folder again"


def is_data_set(folder: Path) -> bool:
    """Whether a data set of Hugging Face was saved here."""
    return (folder / DATA_SET).is_file()


class StoredStates(OthersSamples):
    """The samples of a folder, for a target and the layers of a drafter. Threads may share it.

    Raises FeatureStoreError that names the sample and what differs or is missing, ConfigError where datasets
    or hs-connectors are not installed.
    """

    ahead = True

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.folder, self.name, self._wanted = folder, str(folder), wanted
        self._files = connector_files(f"--features {folder}", folder / STATES)
        self._ids, self._mask, self._written = _columns(folder)
        self._lengths = _lengths(self._ids, folder)
        self._check_files()
        digest = hashlib.sha256()
        self._dtype = torch.bfloat16
        for index in np.linspace(0, len(self) - 1, min(len(self), LOOKED_AT)).astype(int):
            sample = self._sample(index, True)
            self._dtype = sample.features_TF.dtype
            digest.update(sample.features_TF.contiguous().view(torch.uint8).numpy().tobytes())
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return self._lengths

    def made_from(self) -> dict[str, Any]:
        """The data set's own fingerprint, the layers, and a digest of some features."""
        return {"speculators": self._written, "layers": list(self._wanted.layers), "states": self._digest}

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`. Raises FeatureStoreError for a token that the target does not have."""
        ids_T, mask_T = (_row(column, index) for column in (self._ids, self._mask))
        info = self._wanted.info
        if ids_T is None or mask_T is None or len(ids_T) != len(mask_T):
            raise FeatureStoreError(
                f"{self.name}: sample {index} lacks ids or a mask of them; prepare it again"
            )
        if ids_T.min() < 0 or ids_T.max() >= info.vocab_size:
            worst = int(ids_T.min() if ids_T.min() < 0 else ids_T.max())
            raise FeatureStoreError(
                f"{self.name}: sample {index} has token {worst}, {info.name} has {info.vocab_size}; "
                "give the folder of this target"
            )
        return torch.from_numpy(ids_T.astype(np.int64)), torch.from_numpy(mask_T != 0)

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`; files are read whole, as hs-connectors does."""
        return [self._sample(i, last_hidden) for i in indices]

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        hidden = self._wanted.info.hidden_size
        return empty_sample(len(self._wanted.layers) * hidden, hidden, self._dtype)

    def probe(self, target: Target) -> None:
        """Let the target read the beginning of the longest sample, and compare. Raises FeatureStoreError that
        says which layer's states these are, or that they are another model's."""
        index, wanted = int(self._lengths.argmax()), self._wanted
        tokens_T, features_TF, last_TH = (value[:PROBED_TOKENS] for value in self._states(index))
        states, advice = (features_TF, last_TH), f"store layer ids {wanted.ids} of this very model"
        name, layers = f"{self.name}: hs_{index}", wanted.layers
        compare_states(name, FeatureStoreError, target, layers, tokens_T, states, True, advice)

    def _sample(self, index: int, last_hidden: bool) -> FeatureSample:
        tokens_T, features_TF, last_TH = self._states(index)
        mask_T = self.text(index)[1]
        last_TH = last_TH.to(features_TF.dtype) if last_hidden else features_TF[:, :0]
        return FeatureSample(f"{self.name}#{index}", DOMAIN, tokens_T, mask_T, features_TF, last_TH)

    def _states(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [T], features [T, F], last hidden states after the norm, float32 [T, H]."""
        tokens_T, _ = self.text(index)
        try:
            found = self._files.get_cached(index)
            features_TF, last_TH = self._wanted.split(found or {}, tokens_T)
            if not (features_TF.isfinite().all() and last_TH.isfinite().all()):
                raise ValueError("holds numbers that are not finite")
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            where = f"{self.folder / STATES}/hs_{index}.safetensors"
            told = f"its layer ids must be {self._wanted.ids}; {AGAIN}"
            raise FeatureStoreError(f"{where}: {reason(error)}; {told}") from error
        return tokens_T, features_TF, last_TH

    def _check_files(self) -> None:
        """Every sample has its file: looked up in one walk over the folder."""
        states = self.folder / STATES
        there = {entry.name for entry in os.scandir(states)} if states.is_dir() else set()
        missing = [i for i in range(len(self)) if f"hs_{i}.safetensors" not in there]
        if missing:
            told = f"lacks {len(missing)} of {len(self)} files, hs_{missing[0]}.safetensors first"
            raise FeatureStoreError(f"{states}: {told}; {AGAIN}")


def _columns(folder: Path) -> tuple[Any, Any, str]:
    """input_ids and loss_mask as Arrow columns, which stay on disk, and the data set's fingerprint."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"--features {folder}: needs datasets; pip install 'draftkit[data]'") from error
    try:
        rows = datasets.load_from_disk(str(folder))
        table = rows.data
        ids, mask = (table.column(name) for name in ("input_ids", "loss_mask"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"is no data set with input_ids and loss_mask ({reason(error)})"
        raise FeatureStoreError(f"{folder}: {told}; make it with speculators' prepare_data.py") from error
    return ids, mask, str(rows._fingerprint)


def _lengths(ids: Any, folder: Path) -> NDArray[np.int64]:
    """Tokens of each sample, int64 [samples]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        lengths = pc.list_value_length(ids).fill_null(0).to_numpy().astype(np.int64)
    except (pa.ArrowException, TypeError) as error:
        raise FeatureStoreError(f"{folder}: its input_ids are no lists ({reason(error)})") from error
    if not len(lengths) or lengths.min() < 1:
        raise FeatureStoreError(f"{folder}: has no samples, or empty ones; prepare it again")
    return lengths


def _row(column: Any, index: int) -> NDArray[Any] | None:
    """A sample's whole numbers; None where it has none."""
    values = getattr(column[index], "values", None)  # only a list has them
    if values is None or values.null_count:
        return None
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return numbers if numbers.dtype.kind in "iub" else None
