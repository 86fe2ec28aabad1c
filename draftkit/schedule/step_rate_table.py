"""The step-rate file: what `draftkit profile` writes, what planners, the engine and the simulator read, and
SGLang too.

One JSON object. Its top level is SGLang's additive cost table (`--speculative-dspark-sps-table-path`, version
0.5.23, `speculative/dspark_components/dspark_sps.py`): seconds of a step = bias_seconds +
alpha_seconds(requests) + theta_seconds(tokens in the pass), piecewise linear. Ours is the key "draftkit",
which SGLang ignores: the same measurements per context length, and what they were measured on. Files of
SGLang's own profiler, additive or plain (`sample_batch_tokens`, `sample_steps_per_sec`), are read as well;
they name no target and no context.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftkit.artefact import read_json, sealed, was_changed
from draftkit.errors import ScheduleError, reason
from draftkit.output import write_text
from draftkit.schedule.step_rate import Interpolation, StepRate

MOST_STEPS = 10**9  # in a second: nothing is faster
FORMAT = "draftkit-step-rate-1"


@dataclass(frozen=True)
class Measured:
    """What a table was measured on; empty strings where a file does not say."""

    target: str = ""
    target_fingerprint: str = ""
    drafter_fingerprint: str = ""
    device: str = ""
    threads: int = 0
    repeats: int = 0
    tokens_per_request: int = 0  # of the measured passes
    spread: float = 0.0  # median over points of (upper - lower quartile) / median of the repeats
    clock: str = ""  # "wall clock" or "processor time"
    passes: str = ""  # "compiled" or "PyTorch operations"


@dataclass(frozen=True)
class StepRateTable:
    """Seconds of a target pass by context length (tokens a request has before the pass) and tokens in the
    pass.

    `pass_seconds[c][i]` belongs to `contexts[c]` and `tokens[i]`; both ascending. Raises ScheduleError like
    `StepRate`.
    """

    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    pass_seconds: tuple[tuple[float, ...], ...]
    draft_requests: tuple[int, ...] = (1,)
    draft_seconds: tuple[float, ...] = (0.0,)
    interpolation: Interpolation = "linear"
    measured: Measured = Measured()

    def __post_init__(self) -> None:
        if not self.contexts or len(self.contexts) != len(self.pass_seconds):
            rows = len(self.pass_seconds)
            raise ScheduleError(
                f"step rate: {len(self.contexts)} contexts and {rows} rows; give one row for each context"
            )
        if list(self.contexts) != sorted(set(self.contexts)):
            raise ScheduleError(f"step rate: contexts {list(self.contexts)} must be ascending and distinct")
        for row in self.pass_seconds:
            self._curve(row)

    def at(self, context: float) -> StepRate:
        """The curve for requests that have so many tokens, linear between the measured contexts, constant
        outside."""
        rows = np.array(self.pass_seconds)
        return self._curve(tuple(float(np.interp(context, self.contexts, column)) for column in rows.T))

    def middle(self) -> StepRate:
        """The curve of the middle context."""
        return self.at(self.contexts[len(self.contexts) // 2])

    def check_target(self, fingerprint: str) -> None:
        """Raise ScheduleError when the table was measured on another target; a table that names none
        passes."""
        found = self.measured.target_fingerprint
        if found and found != fingerprint:
            raise ScheduleError(
                f"step rate of another target ({self.measured.target}, {found[:12]}; given "
                f"{fingerprint[:12]}); "
                "measure this one with draftkit profile"
            )

    def check_drafter(self, fingerprint: str) -> None:
        """Raise ScheduleError when the drafter's time was not measured, or another drafter's; one that names
        none passes."""
        found = self.measured.drafter_fingerprint
        if not any(self.draft_seconds):
            raise ScheduleError(
                "step rate without a drafter's time; measure it with draftkit profile -d DRAFTER"
            )
        if found and found != fingerprint:
            raise ScheduleError(
                f"step rate of another drafter ({found[:12]}, given {fingerprint[:12]}); measure this one "
                f"with draftkit profile"
            )

    def assumptions(self, most_tokens: int, longest_context: float) -> list[str]:
        """What is assumed where nothing was measured, one sentence each."""
        found = [self.at(longest_context).assumption(most_tokens)]
        if longest_context > self.contexts[-1] and self.contexts[-1] > 0:
            found.append(
                f"the step rate was measured up to {self.contexts[-1]} tokens of context; "
                f"the same is taken for longer ones (here up to {longest_context:.0f})"
            )
        if not self.measured.target_fingerprint:
            found.append("the step-rate file names no target; it is taken to be of this one")
        return [f for f in found if f]

    def _curve(self, row: tuple[float, ...]) -> StepRate:
        return StepRate(self.tokens, row, self.draft_requests, self.draft_seconds, self.interpolation)


def save_step_rate(table: StepRateTable, path: Path) -> None:
    """Write the file; SGLang's part is that of the middle context."""
    middle = table.pass_seconds[len(table.contexts) // 2]
    bias = min(middle)
    content = {
        "bias_seconds": bias,
        "bs_probes": table.draft_requests,
        "alpha_seconds": table.draft_seconds,
        "m_probes": table.tokens,
        "theta_seconds": [s - bias for s in middle],
        "draftkit": {"format": FORMAT, **asdict(table)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(sealed(content), indent=1) + "\n")


def load_step_rate(path: Path) -> StepRateTable:
    """Read our file or one of SGLang's profiler. Raises ScheduleError for anything else."""
    try:
        content = read_json(path, ScheduleError, "is no step-rate table")
        if was_changed(content):
            raise ScheduleError(
                "is damaged (another digest than its own); measure again with draftkit profile"
            )
        if "draftkit" in content:
            return _ours(content["draftkit"])
        if "bias_seconds" in content:
            passes = tuple(content["bias_seconds"] + s for s in content["theta_seconds"])
            return StepRateTable(
                (0,),
                tuple(content["m_probes"]),
                (passes,),
                tuple(content["bs_probes"]),
                tuple(content["alpha_seconds"]),
            )
        rates = content["sample_steps_per_sec"]
        if any(not 0 < r <= MOST_STEPS for r in rates):
            wrong = next(r for r in rates if not 0 < r <= MOST_STEPS)
            raise ScheduleError(
                f"{path}: {wrong!r:.20} steps per second; every value must be positive, at most {MOST_STEPS}"
            )
        return StepRateTable((0,), tuple(content["sample_batch_tokens"]), (tuple(1 / r for r in rates),))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ScheduleError(
            f"{path}: is no step-rate table ({reason(error)}); make one with draftkit profile"
        ) from None


def _ours(content: dict[str, Any]) -> StepRateTable:
    if content.pop("format", None) != FORMAT:
        raise ScheduleError(f"is of another version than {FORMAT}; measure again with draftkit profile")
    rows = tuple(tuple(row) for row in content.pop("pass_seconds"))
    measured = Measured(**content.pop("measured"))
    lists: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    return StepRateTable(pass_seconds=rows, measured=measured, **lists)
