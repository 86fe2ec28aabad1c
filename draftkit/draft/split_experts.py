"""Experts of a draft module that lie apart in training: each process keeps some of them whole, and computes
them for the tokens of all.

Gathering a stage's experts moves all their weights in every pass (13 GB for DeepSeek-V4-Flash); the tokens
that are drafted are a thousandth of that. So tokens go to every process, and each one's share of the answer
comes back as a sum.

Shapes: N tokens of this process, P processes, M the most tokens of one of them, K experts of a token, E
experts of this process, H hidden, I size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts


class SplitExperts(DeepseekV4Experts):
    """Transformers' experts; after `lie_apart` those of all processes together."""

    group: Any = None  # the processes that they lie in

    def lie_apart(self, mesh: DeviceMesh) -> bool:
        """Keep this process's experts alone, along the mesh's second dimension. False, and nothing done, when
        they cannot be shared out evenly. All processes call it with the same weights."""
        if self.num_experts % mesh.size(1):
            return False
        for name, parameter in list(self.named_parameters(recurse=False)):
            part = distribute_tensor(
                parameter.detach().clone(), mesh, [Replicate(), Shard(0)], src_data_rank=None
            )
            setattr(self, name, nn.Parameter(part))
        self.group = mesh.get_group(1)
        return True

    def forward(self, hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """What each token's experts make of it, weighted: [N, H]."""
        if self.group is None:
            mixed: Tensor = super().forward(hidden_NH, index_NK, weight_NK)
            return mixed
        count = len(hidden_NH)
        most = torch.tensor(count, device=hidden_NH.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        spare = (0, 0, 0, int(most) - count)  # rows that no expert is asked for
        hidden = _ToAll.apply(F.pad(hidden_NH, spare), self.group)
        weight = _ToAll.apply(F.pad(weight_NK, spare), self.group)
        index = _ToAll.apply(F.pad(index_NK, spare, value=-1), self.group)
        return _SumBack.apply(self._own(hidden, index, weight), self.group)[:count]

    def _own(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The share of this process's experts, [P * M, H]; each is used, so that each has a gradient."""
        gate_up_EIH, down_EHI = (
            p.to_local().to(hidden.dtype) if isinstance(p, DTensor) else p
            for p in (self.gate_up_proj, self.down_proj)
        )
        first, mixed = dist.get_rank(self.group) * len(down_EHI), torch.zeros_like(hidden)
        for expert, (gate_up_IH, down_HI) in enumerate(zip(gate_up_EIH, down_EHI, strict=True)):
            token, place = torch.where(index == first + expert)
            made = F.linear(self._apply_gate(F.linear(hidden[token], gate_up_IH)), down_HI)
            mixed = mixed.index_add(0, token, (made * weight[token, place, None]).to(mixed.dtype))
        return mixed


class _ToAll(torch.autograd.Function):
    """Rows [M, ...] of all processes, [P * M, ...]; gradients are added up on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _SumBack(torch.autograd.Function):
    """The sum over processes of each one's rows [P * M, ...], to whom they belong: [M, ...]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.group), None


def _gathered(rows: Tensor, group: Any) -> Tensor:
    found = rows.new_empty(len(rows) * dist.get_world_size(group), *rows.shape[1:])
    dist.all_gather_into_tensor(found, rows.contiguous(), group)
    return found


def _summed(rows: Tensor, group: Any) -> Tensor:
    found = rows.new_empty(len(rows) // dist.get_world_size(group), *rows.shape[1:])
    dist.reduce_scatter_tensor(found, rows.contiguous(), group=group)
    return found
