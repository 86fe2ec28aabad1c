"""Experts that lie apart in two processes against experts in one place."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import DeepseekV4Config

from draftkit.draft.split_experts import SplitExperts
from support.deepseek_v4 import tiny_config

COUNTS = (5, 0)  # tokens of the two processes


def pieces(config: DeepseekV4Config) -> tuple[SplitExperts, list[tuple[torch.Tensor, ...]]]:
    """The same experts, and every process's tokens, in all processes."""
    torch.manual_seed(0)
    experts = SplitExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = [
        (
            torch.randn(n, config.hidden_size, requires_grad=True),
            torch.rand(n, config.num_local_experts).argsort(-1)[:, :2],
            torch.rand(n, 2, requires_grad=True),
        )
        for n in COUNTS
    ]
    return experts, rows


def main() -> None:
    """In each of the processes; the first one prints a line of JSON."""
    dist.init_process_group("gloo")
    rank, config = dist.get_rank(), tiny_config()
    whole, rows = pieces(config)
    wanted = whole(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    wanted.square().sum().backward()
    leaf = rows[rank][0].grad, rows[rank][2].grad
    start = sum(COUNTS[:rank])
    experts, rows = pieces(config)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
    apart = experts.lie_apart(mesh)
    got = experts(*rows[rank])
    got.square().sum().backward()
    worst = [float((got - wanted[start : start + COUNTS[rank]]).abs().max()) if COUNTS[rank] else 0.0]
    for found, value in zip((rows[rank][0].grad, rows[rank][2].grad), leaf, strict=True):
        if value is not None and value.numel():
            worst.append(float((found - value).abs().max()))
    for name, parameter in experts.named_parameters():
        gradient, reference = parameter.grad, dict(whole.named_parameters())[name].grad
        assert isinstance(gradient, DTensor) and reference is not None
        worst.append(float((gradient.full_tensor() - reference).abs().max()))
    held = [list(p.to_local().shape) for p in experts.parameters()]  # type: ignore[attr-defined]
    told: list[object] = [None, None]
    dist.all_gather_object(told, {"apart": apart, "worst": max(worst), "held": held})
    if rank == 0:
        print(json.dumps(told))
    dist.destroy_process_group()
