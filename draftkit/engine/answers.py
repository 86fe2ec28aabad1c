"""Answers to prompts through the engine: continuous batching and the lean forward, instead of the Transformers module.

A prompt's answer depends on the prompt, its seed and the sampling settings alone where the compiled pass runs, which is why
building it is waited for: an interrupted run that is started again must end with the same records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from draftkit.data.generate import Answer, Answerer, GenerateSettings, answer_batch, answer_limit
from draftkit.engine.engine import Engine
from draftkit.engine.fast_model import unsupported
from draftkit.engine.request import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import combined_seed
from draftkit.target.transformers import TransformersTarget


def answerer(target: TransformersTarget, running: int) -> Answerer:
    """What answers prompts fastest, at most `running` of them at the same time: the engine, or padded batches through the
    Transformers module for a family without a lean forward."""
    return partial(answer_batch, target) if unsupported(target) else EngineAnswers(target, running)


class EngineAnswers:
    """Answers lists of prompts with a target, at most `running` of them at the same time."""

    def __init__(self, target: TransformersTarget, running: int) -> None:
        self._target = target
        self._engine = Engine(target, None, EngineSettings(max_running=running, prefix_reuse=False))
        self._engine.wait_until_compiled()

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[tuple[int, int]], settings: GenerateSettings
    ) -> list[Answer]:
        """One answer per prompt (token ids), in order. Raises DataError for a prompt that leaves no room."""
        sampling = settings.sampling
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                max_tokens=answer_limit(self._target.info, len(prompt), settings),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=combined_seed(*seed),
            )
            self._engine.add_request(str(index), list(prompt), params)
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        while self._engine.has_work():
            for output in self._engine.step():
                index = int(output.request_id)
                tokens[index] += (e.token_id for e in output.events)
                reasons[index] = output.finish_reason or reasons[index]
        return [Answer(tuple(t), reason) for t, reason in zip(tokens, reasons, strict=True)]
