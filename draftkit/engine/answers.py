"""Answers to prompts through the engine, many side by side: continuous batching and the lean forward.

A prompt's answer depends on the prompt, its seed and the sampling settings alone where the compiled pass runs: an interrupted
run that is started again ends with the same records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from draftkit.data.generate import NO_ROOM, Answer, Answerer, GenerateSettings, answer_in_batches, answer_limit
from draftkit.decode import Decoded, Round
from draftkit.engine.engine import Engine
from draftkit.engine.outputs import StepOutput
from draftkit.engine.paged_model import unsupported
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling, combined_seed
from draftkit.target.transformers import TransformersTarget


def answerer(target: TransformersTarget, running: int) -> Answerer:
    """What answers prompts fastest, at most `running` of them at the same time: the engine, or padded batches through the
    Transformers module for a family without a lean forward."""
    return partial(answer_in_batches, target) if unsupported(target) else EngineAnswers(target, running)


class EngineAnswers:
    """Answers lists of prompts with a target, at most `running` of them at the same time."""

    def __init__(self, target: TransformersTarget, running: int) -> None:
        self._engine = Engine(target, None, EngineSettings(max_running=running, prefix_reuse=False))

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[tuple[int, int]], settings: GenerateSettings
    ) -> list[Answer]:
        """One answer per prompt (token ids), in order; NO_ROOM where a prompt leaves none."""
        limits = [answer_limit(self._engine.info.max_length, len(tokens), settings) for tokens in prompts]
        requests = [
            (tokens, sampling_params(settings.sampling, limit, combined_seed(*seed)))
            for tokens, limit, seed in zip(prompts, limits, seeds, strict=True)
            if limit
        ]
        made = (Answer(d.tokens, d.finish_reason) for d in decode_all(self._engine, requests))
        return [next(made) if limit else NO_ROOM for limit in limits]


def sampling_params(sampling: Sampling, max_new_tokens: int, seed: int) -> SamplingParams:
    """The engine's form of what `decode` takes."""
    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=seed,
    )


def decode_all(
    engine: Engine,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    tick: Callable[[], None] = lambda: None,
) -> list[Decoded]:
    """What `decode` says about each request (tokens and how they are to be answered), made side by side by an idle engine.

    `tick` is called after every answer. Raises DataError for a prompt that does not fit.
    """
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(str(index), list(prompt), params)
    answers = [_Growing(engine.info.gamma) for _ in requests]
    while engine.has_work():
        for output in engine.step():
            answers[int(output.request_id)].add(output)
            if output.finish_reason is not None:
                tick()
    return [answer.decoded() for answer in answers]


class _Growing:
    """An answer as its steps come in. No step's output is kept: thousands of them would keep the garbage collector busy."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._tokens: list[int] = []
        self._rounds: list[Round] = []
        self._last: StepOutput | None = None

    def add(self, output: StepOutput) -> None:
        """The next step; the first one brings the token after the prompt, each other one a round."""
        self._tokens += [e.token_id for e in output.events]
        if self._last is not None:
            before, after = self._last.stats, output.stats
            counts = after.verified - before.verified, after.accepted - before.accepted
            self._rounds.append(Round(self._gamma, *counts, len(output.events)))
        self._last = output

    def decoded(self) -> Decoded:
        """What `decode` would say of it."""
        if self._last is None:
            raise ValueError("no step came in")
        stats = self._last.stats
        reason = self._last.finish_reason or ""
        return Decoded(tuple(self._tokens), reason, tuple(self._rounds), stats.prefill_seconds, stats.decode_seconds)
