"""The engine for Python programs: prompts in, texts out, whole or streamed.

from draftkit import LLM, SamplingParams
llm = LLM("tiny")
[answer] = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(max_tokens=64,
  temperature=0))
print(answer.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

from draftkit.engine.outputs import PromptToken, RequestStats, StepOutput, TokenEvent
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError, ServeError
from draftkit.serve.choice import Choice
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.guard import Guarded
from draftkit.serve.pair import PlanFiles, open_pair
from draftkit.serve.plain_text import PlainText
from draftkit.serve.sampling_defaults import sampling_defaults
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.formats import format_of
from draftkit.target.prompt_format import TemplateError

_SHOW_AFTER = 2.0  # seconds until a progress bar appears
_AT_ONCE = 0.05  # seconds of steps without coming back to a caller who wants whole answers
T = TypeVar("T")

Message = dict[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One answer; `events` say where each token came from, and hold log probabilities where they were asked
    for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None
    events: tuple[TokenEvent, ...]
    stats: RequestStats


@dataclass(frozen=True)
class Generation:
    """The `n` answers to one prompt; `prompt_logprobs`, where they were asked for, are of its tokens from the
    second on."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    prompt_logprobs: tuple[PromptToken, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to a streamed answer; `finish_reason` is None but in the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclass(eq=False)
class _Call:
    """The answers that one call waits for, by the engine's names, and what there is of them that nobody has
    taken yet."""

    choices: dict[str, Choice] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    made: dict[str, Completion] = field(default_factory=dict)
    guards: list[Guarded] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """All its answers are there."""
        return len(self.made) == len(self.choices)

    def raise_errors(self) -> None:
        """What a constraint raised, which has ended its answer."""
        for guard in self.guards:
            if guard.error is not None:
                raise guard.error


class LLM:
    """A target with a drafter, ready to answer. Several threads or tasks may ask at the same time; they
    share batches.

    The engine lives in a thread of its own, which takes one thing after the other from all who ask: a
    signal, which interrupts whoever waits, never interrupts a step. A forked child does not
    have it and needs an `LLM` of its own.

    `target` is "tiny", "smollm2", a folder, a GGUF file or a hub id; `drafter` a folder, "none", or None
    (the one packaged for "tiny" or "smollm2"); `step_rate` and `calibration` are files of `draftkit
    profile` and `draftkit calibrate`; `template_switches` are variables of the chat template, as
    {"enable_thinking": False}. Special tokens' names in messages are text, as in `draftkit serve`, unless
    `honour_special_tokens`; a prompt that is one text is written by the caller alone, and they count in
    it. Calls without parameters sample as the target's generation_config.json says, where it says
    something. Raises TargetError, CheckpointError, ServeError for settings that do not fit, ConfigError
    for switches that the template does not know, or ScheduleError for files of another pair.
    """

    def __init__(
        self,
        target: str = "tiny",
        drafter: str | None = None,
        settings: EngineSettings | None = None,
        step_rate: str | Path | None = None,
        calibration: str | Path | None = None,
        template_switches: dict[str, Any] | None = None,
        honour_special_tokens: bool = False,
    ) -> None:
        if settings is not None and not isinstance(settings, EngineSettings):
            raise ServeError(f"settings are {settings!r}; give EngineSettings(...)")
        files = PlanFiles(*(Path(file) if file else None for file in (step_rate, calibration)))
        self.engine, self.tokenizer = open_pair(target, drafter, settings or EngineSettings(), files)
        self._texts = TokenTexts(self.tokenizer)
        self._format = format_of(self.tokenizer, template_switches)
        self._honours = honour_special_tokens
        self._defaults = SamplingParams(**sampling_defaults(target))
        self._thread = ThreadPoolExecutor(1, "draftkit-engine")
        self._process = os.getpid()
        self._asking: set[_Call] = set()  # those that wait for answers
        self._calls: dict[str, _Call] = {}
        self._serial = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer prompts (texts or token ids), each `n` times, with the same parameters or one set per
        prompt.

        Raises DataError for requests that cannot be served; nothing is then generated.
        """
        given: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        single = isinstance(given, str) or (_is_list(given) and len(given) and isinstance(given[0], Integral))
        if not (single or _is_list(given)):
            raise DataError(f"prompts are {given!r}; give a text, a list of token ids, or a list of these")
        many = [given] if single else list(given)
        return self._run([self._encode(prompt) for prompt in many], params)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer one conversation (a list of messages) or several, through the target's chat template."""
        given: Any = conversations
        many = [given] if given and isinstance(given[0], dict) else list(given)
        return self._run([self._render(messages) for messages in many], params)

    async def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer to one prompt or conversation as it is made; closing the iterator ends it.

        The engine steps in a worker thread, so the event loop stays free.
        """
        given: Any = prompt
        tokens = self._render(given) if len(given) and isinstance(given[0], dict) else self._encode(given)
        params = params or self._defaults
        _check_params([params])
        if params.n != 1:
            raise DataError(f"n is {params.n}; a stream is one answer, open several streams")
        call = _Call()
        try:
            await asyncio.wrap_future(self._do(self._add, call, [(tokens, params)]))
            while not (call.complete and not call.pieces):
                for piece in await asyncio.wrap_future(self._do(self._step, call)):
                    yield piece
            call.raise_errors()
        finally:  # in the thread's queue at once, so that it happens whatever becomes of this task
            await asyncio.shield(asyncio.wrap_future(self._do(self._leave, call)))

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        """A text's token ids, or those that were given, also as an array."""
        given: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(given, str):
            return self._texts.encode(_utf8(given), True)
        if not _is_list(given):
            raise DataError(f"a prompt is {given!r}; give a text, or a list of token ids")
        return tuple(given)

    def _render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        plain = PlainText(self._texts)
        shown = list(messages) if self._honours else [plain.mark(m) for m in messages]
        try:
            if isinstance(self._format, DeepseekFormat):
                return self._format.prompt(messages)
            return plain.encode(_utf8(self._format.text(shown)), False)
        except DataError as error:
            reason = plain.unmarked(error.reason) if isinstance(error, TemplateError) else error
            raise DataError(f"the chat template cannot render these messages: {reason}") from error

    def _run(
        self, prompts: list[tuple[int, ...]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Generation]:
        each = [params or self._defaults] * len(prompts) if not isinstance(params, Sequence) else list(params)
        _check_params(each)
        if len(each) != len(prompts):
            raise DataError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts; give one for all or one for "
                f"each"
            )
        if any(p.constraint is not None for p in each) and sum(p.n for p in each) > 1:
            raise DataError("a constraint belongs to one answer; ask for one at a time")
        work = [
            (tokens, _of_choice(p, i)) for tokens, p in zip(prompts, each, strict=True) for i in range(p.n)
        ]
        call = _Call()
        try:
            self._do(self._add, call, work).result()
            self._finish(call)
        finally:
            self._do(self._leave, call).result()
        answers = iter([(call.made[name], choice.prompt) for name, choice in call.choices.items()])
        own = [list(itertools.islice(answers, p.n)) for p in each]
        return [
            Generation(tokens, tuple(made for made, _ in answered), answered[0][1])
            for tokens, answered in zip(prompts, own, strict=True)
        ]

    def _finish(self, call: _Call) -> None:
        """Wait until all answers are there; a progress bar appears when it takes long."""
        began = time.monotonic()
        with ExitStack() as stack:
            progress, bar = None, TaskID(0)
            while not call.complete:
                self._do(self._step, call, _AT_ONCE).result()
                if progress is None and time.monotonic() - began > _SHOW_AFTER:
                    progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
                    bar = progress.add_task("answers", total=len(call.choices))
                if progress is not None:
                    progress.update(bar, completed=len(call.made))
        call.raise_errors()

    def _do(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Something for the engine's thread, after what others have asked for. Raises DataError in a forked
        child."""
        if os.getpid() != self._process:
            raise DataError(
                "this LLM stayed in the process that was forked; make one here, or start processes with spawn"
            )
        return self._thread.submit(function, *args)

    # ---- the engine's thread ----

    def _add(self, call: _Call, work: list[tuple[tuple[int, ...], SamplingParams]]) -> None:
        """Hand all to the engine; what is there when one cannot be served is given up by `_leave`."""
        self._asking.add(call)
        for tokens, params in work:
            if params.bad_words:
                params = replace(
                    params, bad_token_ids=params.bad_token_ids + self._texts.spellings(params.bad_words)
                )
            if params.constraint is not None:
                guard = Guarded(params.constraint, self.engine.info.vocab_size)
                call.guards.append(guard)
                params = replace(params, constraint=guard)
            name = f"llm-{next(self._serial)}"
            call.choices[name], self._calls[name] = Choice(self._texts, params, len(tokens)), call
            self.engine.add_request(name, tokens, params)

    def _step(self, call: _Call, seconds: float = 0.0) -> list[Piece]:
        """What there is of a stream; steps the engine, for everybody, while there is nothing, and for so long
        at least as nobody else asks. Raises what a constraint of this call raised."""
        until = time.monotonic() + seconds
        while not call.complete and (not call.pieces or time.monotonic() < until):
            for output in self.engine.step():
                if (owner := self._calls.get(output.request_id)) is not None:
                    self._take(owner, output)
            if len(self._asking) > 1:
                break  # what they wait for may be there
        call.raise_errors()
        pieces, call.pieces = call.pieces, []
        return pieces

    def _take(self, call: _Call, output: StepOutput) -> None:
        """One step's output for an answer of this call; nothing after its end."""
        name, choice = output.request_id, call.choices[output.request_id]
        if name in call.made:
            return
        delta = choice.add(output)
        call.pieces.append(Piece(delta.text, tuple(e.token_id for e in delta.events), delta.finish_reason))
        if choice.stopped_by_text:
            self.engine.abort(name)
        if choice.finish_reason is not None:
            call.made[name] = _completion(choice, choice.finish_reason, output.stats)

    def _leave(self, call: _Call) -> None:
        """Nobody waits for this call any more: whatever the engine still has of it is given up."""
        self._asking.discard(call)
        for name in call.choices:
            self._calls.pop(name, None)
            self.engine.abort(name)


def _of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of one of the `n` answers: seeds in a row, and the prompt is scored once."""
    if not index:
        return params
    return replace(params, seed=None if params.seed is None else params.seed + index, prompt_logprobs=None)


def _completion(choice: Choice, finish_reason: str, stats: RequestStats) -> Completion:
    events = tuple(choice.events)
    ids = tuple(e.token_id for e in events)
    return Completion(choice.text, ids, finish_reason, choice.stop_reason, events, stats)


def _is_list(given: object) -> bool:
    """Whether it may be a list of prompts or token ids: of bytes the numbers would be taken."""
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)


def _utf8(text: str) -> str:
    """The text itself. Raises DataError for half a surrogate pair, of which the tokenizer does not say what
    is wrong."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a prompt holds half a character ({error.reason} at {error.start}); give whole ones"
        ) from error
    return text


def _check_params(each: Sequence[object]) -> None:
    for params in each:
        if not isinstance(params, SamplingParams):
            raise DataError(
                f"sampling parameters are {params!r}; give SamplingParams(...), one for all or one for "
                f"each prompt"
            )
