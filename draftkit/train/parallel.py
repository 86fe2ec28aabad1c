"""All of torch.distributed: which processes train together, how a drafter lies in them, and what they add up.

One process in float32 needs none of it. Otherwise the drafter is wrapped by FSDP2 (`fully_shard`): with
`shard` every process holds a part of each parameter, gradient and moment, of a V4 module's experts whole ones
that stay where they are (`draft/split_experts.py`); without, a whole copy, and gradients are added up.
Parameters stay float32; with a `compute` dtype of bfloat16 the passes see rounded copies, and gradients are
added up in float32. Gradients are sums here, never means: the trainer divides by the number of tokens of all
processes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from draftkit.draft.drafter import Drafter, LossReport, TrainBatch
from draftkit.draft.split_experts import SplitExperts
from draftkit.settings import LossSettings
from draftkit.target.loading import best_device

T = TypeVar("T")
TIMEOUT = timedelta(minutes=60)  # the first process decodes and writes checkpoints while the others wait


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def collect(self, values: list[T]) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return values
        held: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(held, values)
        return [value for part in held for value in part]

    def from_first(self, value: float) -> float:
        """The first process's value, on all of them."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(held, 0)
        return float(held)


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def join_world() -> Iterator[World]:
    """The processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or this one alone; NCCL on GPUs,
    else gloo."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(best_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank, size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Objective(nn.Module):
    """A drafter's loss as a forward pass, which is what FSDP2 wraps."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(self, batch: TrainBatch, settings: LossSettings) -> dict[str, Any]:
        """The fields of a LossReport."""
        return dict(vars(self.drafter.loss(batch, settings)))


class ParallelDrafter:
    """A drafter as it lies in the processes. `drafter` is what is trained; `whole` gives a complete one. A
    device never holds more of a large one than its own part and the layer that is being shared out."""

    def __init__(self, drafter: Drafter, world: World, shard: bool, compute: torch.dtype) -> None:
        self.drafter, self.world = drafter, world
        self._whole = drafter
        if world.device.type == "cpu":
            compute = torch.float32  # `arithmetic` rounds what is multiplied
            drafter.to(next(drafter.parameters()).dtype)  # the target's head: else each chunk would make it
        self._objective = Objective(drafter)
        if world.size > 1 or compute != torch.float32:
            self._whole = copy.deepcopy(drafter).cpu() if world.first else drafter
            _wrap(self._objective, world, shard, compute)
        drafter.to(world.device)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {n: p for n, p in self.drafter.named_parameters() if p.requires_grad}

    def loss(self, batch: TrainBatch, settings: LossSettings, last: bool = True) -> LossReport:
        """The drafter's loss; gradients are added up over processes when the `last` micro-batch of a step
        goes back."""
        if not isinstance(self._objective, FSDPModule):
            return LossReport(**self._objective(batch, settings))
        self._objective.set_requires_gradient_sync(last)
        report = LossReport(**self._objective(batch, settings))
        if not torch.is_grad_enabled():
            self._objective.reshard()  # backward does it else
        return report

    def whole(self) -> Drafter:
        """The complete drafter with its present weights, in float32; all processes call it, the first may use
        it."""
        kept = self._whole.state_dict() if self._whole is not self.drafter else None
        for name, value in self.drafter.state_dict().items():
            found = to_whole(value)
            if kept is not None:
                kept[name].copy_(found)
        return self._whole


def to_whole(value: Tensor) -> Tensor:
    """The complete tensor of one that may lie in parts; all processes call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def to_part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a complete tensor, laid out like another."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _experts_apart(objective: Objective, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave experts where they lie: the parameters that FSDP2 has nothing to do with."""
    found = [m for m in objective.modules() if isinstance(m, SplitExperts) and m.lie_apart(mesh)]
    return {parameter for experts in found for parameter in experts.parameters()}


def _wrap(objective: Objective, world: World, shard: bool, compute: torch.dtype) -> None:
    """One FSDP2 group per layer of a stack, so that only one is whole at a time, and one for the rest."""
    if not dist.is_initialized():  # bfloat16 in a process on its own
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    shape = (1, world.size) if shard else (world.size, 1)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("copies", "parts"))
    rounded = None if compute == torch.float32 else compute
    policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32)
    groups = [layer for stack in objective.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    apart = _experts_apart(objective, mesh) if shard and world.size > 1 else set()
    for module in (*groups, objective):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=apart)
    for wrapped in objective.modules():
        if isinstance(wrapped, FSDPModule):
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
