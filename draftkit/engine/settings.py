"""What the operator of an engine decides, and what an engine says about itself: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from draftkit.errors import ServeError

if TYPE_CHECKING:
    from draftkit.schedule.calibration import Calibration
    from draftkit.schedule.step_rate import StepRate

Plan = Literal["planned", "fixed"]
PLANS = ("planned", "fixed")
DTYPE_NAMES = ("float32", "bfloat16", "float64")
_MOST_RUNNING = 65_536  # each has rows of numbers from the start


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and limits. Raises ServeError on values that cannot work.

    Attributes:
        plan: how many drafted tokens are verified: "planned" by confidence and load, "fixed" all of them.
        step_rate: what a step costs, for "planned"; None = a short measurement at the start.
        calibration: temperatures of the drafter's confidences; None = they are taken as they are.
        dtype: float32, bfloat16 or float64 for both models; None = float32 on a CPU, bfloat16 on a GPU.
        device: a torch device; None = a GPU where there is one.
        max_running: requests that are worked on at the same time; more wait.
        max_length: tokens of one request, prompt and answer; None = all that the target allows (and the
            memory holds, where that is not given either).
        step_tokens: tokens of prompts and answers that one step reads at most (longer prompts are cut into
            chunks); drafted ones come on top.
        kv_bytes: memory for keys and values of target and drafter together; None = most of what a GPU has
            free, on a CPU one GiB, or what one request needs.
        block_size: positions per block of that memory.
        compile: before the first request, build the C++ pass where it can run (float32 or bfloat16 on a CPU
            with a compiler), or record CUDA graphs on a GPU; elsewhere PyTorch operations do the same.
        prefix_reuse: let requests share the memory of equal beginnings.
    """

    plan: Plan = "planned"
    step_rate: StepRate | None = None
    calibration: Calibration | None = None
    dtype: str | None = None
    device: str | None = None
    max_running: int = 64
    max_length: int | None = None
    step_tokens: int = 512
    kv_bytes: int | None = None
    block_size: int = 16
    compile: bool = True
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise ServeError(f"plan is {self.plan!r}; choose one of {', '.join(PLANS)}")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise ServeError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPE_NAMES)}")
        for name in ("max_running", "step_tokens", "kv_bytes", "block_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ServeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_running > _MOST_RUNNING:
            raise ServeError(f"max_running is {self.max_running}; it may be {_MOST_RUNNING} at most")
        if self.max_length is not None and self.max_length < 2:
            raise ServeError(f"max_length is {self.max_length}; it must be 2 or more")


@dataclass(frozen=True)
class EngineInfo:
    """What is being served; `gamma` is 0 without a drafter, `forward` says which pass of the target runs."""

    name: str
    max_length: int
    vocab_size: int
    gamma: int
    kv_blocks_total: int
    max_running: int
    algorithm: str
    forward: str
