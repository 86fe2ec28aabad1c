"""Acceptance traces: what a drafter's proposal would have yielded after EVERY token of an answer.

A round of decoding skips the tokens that it accepts, so recorded rounds say nothing about another plan. A
trace has one row per token of the answer (anchor): the confidences of the proposal after it, and how many of
its tokens the rule keeps when all are verified. A plan that verifies l of them keeps min(accepted, l), and
its next round is the row of the token where it ends. Under sampling that row belongs to the recorded
continuation, not to the accepted tokens: right in distribution, not token by token.

Shapes: N rows (anchors of all prompts), G = gamma drafted positions, P prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from draftkit.errors import ScheduleError
from draftkit.output import write_tensors
from draftkit.schedule.step_rate import Floats, Ints

FORMAT = "draftkit-traces-1"
TENSORS = ("confidence", "draft_max", "accepted", "block_accepted", "usable")
ORIGIN = {  # fields of an origin, and what it means when one differs
    "target_fingerprint": "another target",
    "drafter_fingerprint": "another drafter",
    "temperature": "another temperature",
    "prompts_hash": "other prompts",
    "max_new_tokens": "another limit of new tokens",
    "seed": "another seed",
}


@dataclass(frozen=True)
class Origin:
    """Where a trace comes from. Fingerprints are those of `target.fingerprint`; the last three are those of
    `draftkit calibrate`, which records into a file once and reads it from then on."""

    target: str
    target_fingerprint: str
    drafter_fingerprint: str
    temperature: float
    prompts_hash: str = ""
    max_new_tokens: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TracedPrompt:
    """Rows first..first + rows of the trace belong to this prompt, one per token of its answer but the
    last."""

    prompt_id: str
    domain: str
    prompt_tokens: int
    first: int
    rows: int


@dataclass(frozen=True)
class Traces:
    """Rows of all prompts. `confidence_NG` in [0, 1], NaN for a drafter without a confidence head;
    `draft_max_NG` is the largest probability of the drafter's softmax at temperature 1, known before the
    token is drawn; `usable_N` counts the drafted positions up to the first stop token, `accepted_N` <=
    usable_N those that are kept when all are verified token by token, `block_accepted_N` those that block
    verification keeps of the same proposal, drawn with the same uniform."""

    origin: Origin
    prompts: tuple[TracedPrompt, ...]
    confidence_NG: npt.NDArray[np.float32]
    draft_max_NG: npt.NDArray[np.float32]
    accepted_N: Ints
    block_accepted_N: Ints
    usable_N: Ints

    @property
    def gamma(self) -> int:
        """Drafted tokens per round."""
        return self.confidence_NG.shape[1]

    @property
    def has_confidence(self) -> bool:
        """Whether the drafter had a confidence head."""
        return not bool(np.isnan(self.confidence_NG).all())

    def rows_of(self, prompts: Sequence[TracedPrompt]) -> Ints:
        """Row numbers of some prompts, [n]."""
        ranges = [np.arange(p.first, p.first + p.rows) for p in prompts]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def labels(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Whether the whole prefix up to a position is kept (1.0 or 0.0), and whether the position counts:
        both [N, G]."""
        position = np.arange(self.gamma)
        return (position < self.accepted_N[:, None]).astype(np.float64), position < self.usable_N[:, None]

    def check_origin(self, wanted: Origin, path: Path) -> None:
        """Raise ScheduleError when the trace, which lies at `path`, was recorded with something else."""
        for name, what in ORIGIN.items():
            if getattr(self.origin, name) != getattr(wanted, name):
                raise ScheduleError(f"{path}: recorded with {what}; remove it or choose another -o")


def save_traces(traces: Traces, path: Path) -> None:
    """Write one safetensors file, replaced in one rename. Raises OSError that names it when the disk does not
    take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors: dict[str, npt.NDArray[Any]] = {
        "confidence": traces.confidence_NG,
        "draft_max": traces.draft_max_NG.astype(np.float16),
        "accepted": traces.accepted_N.astype(np.int16),
        "block_accepted": traces.block_accepted_N.astype(np.int16),
        "usable": traces.usable_N.astype(np.int16),
    }
    metadata = {
        "format": FORMAT,
        "origin": json.dumps(asdict(traces.origin)),
        "prompts": json.dumps([asdict(p) for p in traces.prompts]),
    }
    write_tensors(partial, tensors, save_file, metadata | {"sha256": _digest(metadata, tensors)})
    partial.replace(path)


def _digest(metadata: dict[str, str], tensors: dict[str, npt.NDArray[Any]]) -> str:
    """The sha256 of what a trace file says, in hexadecimal."""
    digest = hashlib.sha256("".join(metadata[name] for name in ("format", "origin", "prompts")).encode())
    for name in TENSORS:
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def load_traces(path: Path) -> Traces:
    """Read a file of `save_traces`. Raises ScheduleError for anything else, and for one that is damaged: it
    holds a sha256 of its content."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ScheduleError(
                    f"{path}: is no trace file ({FORMAT}); record one with draftkit calibrate"
                )
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        if metadata.get("sha256") != _digest(metadata, tensors):
            raise ScheduleError(
                f"{path}: is damaged (another sha256); remove it and record them again with draftkit "
                f"calibrate"
            )
        prompts = tuple(TracedPrompt(**p) for p in json.loads(metadata["prompts"]))
        origin = Origin(**json.loads(metadata["origin"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        hint = "remove it and record them again" if path.is_file() else "record them"
        raise ScheduleError(
            f"{path}: cannot be read as traces ({error}); {hint} with draftkit calibrate"
        ) from None
    confidence_NG, draft_max_NG, *counts = tensors.values()
    traces = Traces(
        origin, prompts, confidence_NG, draft_max_NG.astype(np.float32), *(c.astype(np.int64) for c in counts)
    )
    if sum(p.rows for p in prompts) != len(traces.accepted_N) or traces.confidence_NG.ndim != 2:
        raise ScheduleError(
            f"{path}: rows of prompts and of tensors differ; the file is damaged, record it again"
        )
    return traces


def join_traces(parts: Sequence[Traces]) -> Traces:
    """Traces of one pair, one after the other. Raises ScheduleError when there are none or the pairs
    differ."""
    if not parts or any(p.origin != parts[0].origin or p.gamma != parts[0].gamma for p in parts):
        raise ScheduleError(
            f"traces of {len({p.origin for p in parts})} pairs; give traces of one, at least one"
        )
    prompts, offset = [], 0
    for part in parts:
        prompts += [replace(p, first=p.first + offset) for p in part.prompts]
        offset += len(part.accepted_N)
    names = ("confidence_NG", "draft_max_NG", "accepted_N", "block_accepted_N", "usable_N")
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in names]
    return Traces(parts[0].origin, tuple(prompts), *joined)
