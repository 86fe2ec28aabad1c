"""Requests for a small engine, and how to run it to the end."""

from __future__ import annotations

from draftkit.engine.engine import Engine
from draftkit.engine.outputs import StepOutput
from draftkit.engine.settings import EngineSettings

PROMPTS = [[4, 20, 31, 7], [9, 9, 9], list(range(40, 90)), [100], [4, 20, 31, 8, 9, 10], [77] * 33]


def finish(engine: Engine, steps: int = 10_000) -> dict[str, list[StepOutput]]:
    """Run until nothing is left to do; the outputs of each request."""
    outputs: dict[str, list[StepOutput]] = {}
    for _ in range(steps):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"not finished after {steps} steps")


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [event.token_id for output in outputs for event in output.events]


def small(**changes: object) -> EngineSettings:
    given = {
        "plan": "fixed",
        "dtype": "float64",
        "device": "cpu",
        "kv_bytes": 2**22,
        "block_size": 4,
        "step_tokens": 16,
    }
    return EngineSettings(**given | changes)  # type: ignore[arg-type]
