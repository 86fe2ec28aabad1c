"""A part of `checks.gpu`: a random tiny DeepSeek-V4 and its module on a device, and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from draftkit.decode import decode
from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling
from draftkit.target.transformers import TransformersTarget

LIMIT = 24  # tokens of an answer
TOLERANCE = 1e-3  # of float32, as a share of the largest logit
GREEDY = Sampling(0.0)


def deepseek_v4(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Logits, and greedy answers by the reference loop and by the engine, each with drafts."""
    from support.deepseek_v4 import tiny_drafter, tiny_target

    numbers = torch.Generator().manual_seed(4)
    prompts = torch.randint(0, 90, (4, 20), generator=numbers)
    target = tiny_target(heavy=6)
    drafter = tiny_drafter(target)
    with torch.inference_mode():
        wanted = target.logits(target.forward(prompts, None).last_hidden_BTH)
        alone = [decode(target, None, p, GREEDY, LIMIT).tokens for p in prompts.tolist()]
        target.model.to(device)
        found = target.logits(target.forward(prompts.to(device), None).last_hidden_BTH).cpu()
    share = float((found - wanted).abs().max() / wanted.abs().max())
    yield "logits", {"largest_difference": share, "wrong": share > TOLERANCE}
    for name, made in _answers(target, drafter.to(device), prompts.tolist()).items():
        parted = sum(a != b for a, b in zip(made, alone, strict=True))
        yield f"greedy answers, {name}", {"parted": parted, "of": len(alone), "wrong": parted > 0}


def _answers(
    target: TransformersTarget, drafter: Drafter, prompts: list[list[int]]
) -> dict[str, list[tuple[int, ...]]]:
    settings = EngineSettings(plan="fixed", dtype="float32", max_running=4, prefix_reuse=False)
    asked = [(prompt, sampling_params(GREEDY, LIMIT, 0)) for prompt in prompts]
    return {
        "loop": [decode(target, drafter, p, GREEDY, LIMIT).tokens for p in prompts],
        "engine": [answer.tokens for answer in decode_all(Engine(target, drafter, settings), asked)],
    }
