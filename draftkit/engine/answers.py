"""Answers to prompts through the engine, many side by side: continuous batching and the lean forward.

A prompt's answer depends on the prompt, its seed and the sampling settings alone where the compiled pass
runs: an interrupted run that is started again ends with the same records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftkit.data.answers import NO_ROOM, Answer, Answers, Question, answer_limit, sampling_of
from draftkit.data.padded_answers import PaddedAnswers
from draftkit.decode import Decoded, Round
from draftkit.engine.engine import Engine
from draftkit.engine.outputs import StepOutput
from draftkit.engine.paged_model import unsupported
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling, combined_seed
from draftkit.settings import GenerateSettings
from draftkit.target.transformers import TransformersTarget


def answerer(target: TransformersTarget, running: int) -> Answers:
    """What answers prompts fastest, at most `running` of them at the same time: the engine, or padded batches
    through the Transformers module for a family without a lean forward that can be padded on the left."""
    padded = unsupported(target) and target.pads_left
    return PaddedAnswers(target, running) if padded else EngineAnswers(target, running)


class EngineAnswers(Answers):
    """Answers questions by the engine, at most `running` of them at the same time: as one ends, the next can
    begin."""

    def __init__(self, target: TransformersTarget, running: int) -> None:
        self._engine = Engine(target, None, EngineSettings(max_running=running, prefix_reuse=False))
        self._running = running
        self._written: dict[str, list[int]] = {}
        self._no_room: list[str] = []

    @property
    def room(self) -> int:
        """How many questions more it takes now."""
        return self._running - len(self._written)

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Begin to answer; a prompt that leaves no room is answered by NO_ROOM."""
        limit = answer_limit(self._engine.info.max_length, len(question.prompt_ids), settings)
        if not limit:
            self._no_room.append(question.key)
            return
        self._written[question.key] = []
        params = sampling_params(sampling_of(settings), limit, combined_seed(*question.seed))
        self._engine.add_request(question.key, list(question.prompt_ids), params)

    def finished(self) -> list[tuple[str, Answer]]:
        """Step the engine until an answer is finished."""
        found = [(key, NO_ROOM) for key in self._no_room]
        self._no_room = []
        while not found and self._written:
            outputs = self._engine.step()
            self.on_tokens(sum(len(output.events) for output in outputs))
            for output in outputs:
                tokens = self._written[output.request_id]
                tokens += [e.token_id for e in output.events]
                if output.finish_reason is not None:
                    del self._written[output.request_id]
                    found.append((output.request_id, Answer(tuple(tokens), output.finish_reason)))
        return found


def sampling_params(sampling: Sampling, max_new_tokens: int, seed: int | None) -> SamplingParams:
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
    """What `decode` says about each request (tokens and how they are to be answered), made side by side by an
    idle engine.

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
    """An answer as its steps come in. No step's output is kept: thousands of them would keep the garbage
    collector busy."""

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
        return Decoded(
            tuple(self._tokens), reason, tuple(self._rounds), stats.prefill_seconds, stats.decode_seconds
        )
