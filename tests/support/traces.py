"""Made-up traces."""

from __future__ import annotations

import numpy as np

from draftkit.schedule.traces import Origin, TracedPrompt, Traces


def made_traces(
    gamma: int = 4, prompts: int = 40, rows: int = 30, head: bool = True, seed: int = 0
) -> Traces:
    """Easy and hard prompts; the confidences are the true chances."""
    rng = np.random.default_rng(seed)
    ease = np.repeat(rng.uniform(0.3, 0.95, prompts), rows)
    chance = np.clip(ease[:, None] + rng.normal(0, 0.15, (prompts * rows, gamma)), 0.02, 0.98)
    accepted = (rng.uniform(size=chance.shape) < chance).cumprod(-1).sum(-1)
    return Traces(
        Origin("tiny", "target-1", "drafter-1", 1.0),
        tuple(TracedPrompt(f"p{i}", "code", 20, i * rows, rows) for i in range(prompts)),
        (chance if head else np.full_like(chance, np.nan)).astype(np.float32),
        chance.astype(np.float32),
        accepted.astype(np.int64),
        accepted.astype(np.int64),
        np.full(len(accepted), gamma),
    )
