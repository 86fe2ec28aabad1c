"""The engine: many requests at once; each step drafts, plans, verifies everything in one flattened pass, and commits.

Shapes: R requests of a step, A of them get a token, D of them draft, G = gamma drafted tokens, T tokens of the pass,
N rows of logits, V vocabulary, F features.
"""

from __future__ import annotations

import logging
import operator
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.drafter import Drafter
from draftkit.engine.adjust import Adjustment, needs_adjustment
from draftkit.engine.commit import Outcome, commit
from draftkit.engine.drawing import Drawing
from draftkit.engine.fast_model import ReadOut
from draftkit.engine.measure import can_measure, measure_step_rate, warm_up
from draftkit.engine.metrics import EngineMetrics, Tally
from draftkit.engine.models import Models, build_models, start_compiling
from draftkit.engine.passes import Pass
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.request import SamplingParams, StepOutput
from draftkit.engine.round import Offered, adjust_rows, place, verify_proposals
from draftkit.engine.running import Running, Uniforms
from draftkit.engine.scheduler import Scheduler, Work
from draftkit.engine.scoring import Scoring, score, to_score
from draftkit.engine.settings import EngineSettings
from draftkit.engine.unread import LONG, Unread
from draftkit.errors import DataError
from draftkit.ops.sampling import row_settings
from draftkit.target.transformers import TransformersTarget

log = logging.getLogger("draftkit.engine")


class Engine:
    """Answers of many requests, step by step, in one thread.

    `target` and `drafter` are names (folder or hub id) or loaded models; a loaded drafter is moved to the target's device and
    dtype. Raises what loading them raises, ServeError when the memory is too small, and ScheduleError when a calibration does
    not fit the drafter.
    """

    def __init__(
        self,
        target: str | TransformersTarget,
        drafter: str | Path | Drafter | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        self._models = build_models(target, drafter, settings)
        self.info = self._models.info
        self._requests: dict[str, Running] = {}
        self._adjustments: dict[str, Adjustment] = {}
        self.calibration = settings.calibration
        if self.calibration is not None:
            self.calibration.check_gamma(self.info.gamma)
        self._planner = LengthPlanner(settings.max_running, self.info.gamma, self.calibration)
        self._scheduler = Scheduler(  # nothing below an engine points back to it: one that is given up frees its memory at once
            self._models.pool,
            settings.max_running,
            self.info.max_length,
            self.info.gamma,
            settings.step_tokens,
            self._planner,
            partial(_forget, self._planner, self._models),
        )
        self._tally = Tally(self.info.gamma)
        self._unread = Unread(self._models.drafter, self._models.pool) if self._models.drafter is not None else None
        self._compiled = start_compiling(self._models) if settings.compile else None
        self._uses_compiled = self._measures_again = False
        measures = settings.plan == "planned" and settings.step_rate is None
        self._drafter_to_measure = self._models.drafter if measures else None
        self._max_running = settings.max_running
        if settings.plan == "planned" and settings.step_rate is not None:
            self._planner.use(settings.step_rate)
        if self._compiled is not None and self._models.device.type == "cuda" and self._compiled.wait():
            warm_up(self._models, settings.max_running, settings.step_tokens)
            self._switch_to_compiled()
        if self._drafter_to_measure is not None and self._planner.step_rate is None:
            self._planner.use(measure_step_rate(self._models, self._drafter_to_measure, self._max_running))

    def add_request(self, request_id: str, tokens: Sequence[int], params: SamplingParams) -> None:
        """Put a request in the queue. Raises DataError for one that cannot be served."""
        try:
            tokens = list(map(operator.index, tokens))
        except TypeError as error:
            raise DataError(f"a prompt is a list of token ids, which are whole numbers ({error})") from error
        self._check(request_id, tokens, params)
        stop_ids: dict[int, int | None] = {t: t for t in params.stop_token_ids}
        if not params.ignore_eos:
            stop_ids |= dict.fromkeys(self._models.stop_token_ids)
        gamma = self.info.gamma if params.draft else 0
        seed = random.getrandbits(63) if params.seed is None else params.seed
        room = self.info.max_length - len(tokens)
        request = Running(
            request_id,
            params,
            tokens,
            len(tokens),
            min(params.max_tokens or room, room),
            stop_ids,
            Uniforms(seed, gamma),
            gamma,
            per_position=[0] * gamma,
        )
        if needs_adjustment(params):
            like = torch.empty(0, device=self._models.device)
            self._adjustments[request_id] = Adjustment(params, tokens, list(stop_ids), self.info.vocab_size, like)
        self._requests[request_id] = request  # nothing can fail from here on
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; nothing happens when it is not there (any more)."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._adjustments.pop(request_id, None)
            self._scheduler.remove(request)

    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self._requests)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """One round for all who decode, one chunk for prompts that are being read; what it adds to each answer."""
        self._switch_to_compiled()
        began, before = time.perf_counter(), self._model_seconds
        work = self._scheduler.schedule()
        if not work.requests:
            return []
        settings, uniforms = self._randomness(work)
        offered = self._draft(work, settings, uniforms)
        step, read = self._read(work, offered)
        outcome = self._verify(work, offered, read, settings, uniforms)
        self._extend(work, step, read, outcome)
        outputs = commit(work, outcome, self._adjustments, self._models.pool)
        for output in outputs:
            if output.finish_reason is not None:
                self.abort(output.request_id)
        seconds = time.perf_counter() - began
        if len(work.requests) == work.decoding:
            verified = int(offered.lengths_A.sum()) if offered.drafting else 0
            self._planner.record(work.requests, outputs, verified, seconds)
        else:
            self._planner.disturb()
        self._tally.other_seconds += seconds - (self._model_seconds - before)
        return outputs

    @property
    def metrics(self) -> EngineMetrics:
        """A snapshot; may be read from another thread."""
        tally, scheduler, pool = self._tally, self._scheduler, self._models.pool
        return EngineMetrics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used=pool.used,
            kv_total=pool.num_blocks,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            rounds=tally.rounds,
            drafted=tally.drafted,
            verified=tally.verified,
            accepted=tally.accepted,
            wasted=tally.verified - tally.accepted,
            accepted_per_position=tuple(tally.per_position.tolist()),
            draft_seconds=tally.draft_seconds,
            verify_seconds=tally.verify_seconds,
            other_seconds=tally.other_seconds,
            preemptions=scheduler.preemptions,
            calibration_error=tally.calibration_error,
        )

    def settling(self) -> bool:
        """To be called by whoever is idle: takes compiled passes that have become ready into use and measures them now, not in
        the next request's time. Returns whether to call again."""
        self._switch_to_compiled()
        return self._compiled is not None or self._measures_again

    def wait_until_compiled(self) -> bool:
        """For measurements: wait until it is settled which passes are used; whether they are the compiled ones."""
        if self._compiled is not None:
            self._compiled.wait()
        self._switch_to_compiled()
        return self._uses_compiled

    def _switch_to_compiled(self) -> None:
        """Once, when the compiled passes have come into use: what a step costs must be measured again, as soon as there is
        memory to do it in."""
        if self._compiled is not None and (used := self._compiled.done()) is not None:
            why = f"not in use, PyTorch operations do the same slower ({self._compiled.reason})"
            log.info("compiled passes: %s", "in use" if used else why)
            self._compiled, self._uses_compiled = None, used
            self._measures_again = used and self._drafter_to_measure is not None
        if self._measures_again and self._drafter_to_measure is not None and can_measure(self._models):
            self._measures_again = False
            self._planner.use(measure_step_rate(self._models, self._drafter_to_measure, self._max_running))

    # --- the parts of a step

    def _randomness(self, work: Work) -> tuple[np.ndarray, np.ndarray]:
        """Sampling settings [A] of the requests that get a token, and their uniforms [A, G + 2] (drafts, length, token)."""
        answering = work.requests[: work.answering]
        settings = row_settings([r.params for r in answering])
        uniforms = np.zeros((work.answering, self.info.gamma + 2))
        if settings["temperature"].any():
            for index, request in enumerate(answering):
                if index < work.decoding:
                    drawn = request.uniforms.round()
                    uniforms[index, -len(drawn) :] = drawn
                else:
                    uniforms[index, -1] = request.uniforms.first()
        return settings, uniforms

    def _draft(self, work: Work, settings: np.ndarray, uniforms: np.ndarray) -> Offered:
        """Proposals of those who draft, with the lengths that the plan lets through."""
        lengths_A = np.zeros(work.answering, np.int64)
        chosen = self._planner.choose_drafting(work.requests[: work.decoding])
        drafter, device = self._models.drafter, self._models.device
        if drafter is None or not chosen:
            empty = torch.empty(work.answering, 0, dtype=torch.int64, device=device)
            return Offered(empty, None, lengths_A, [], None)
        drafting = [work.requests[i] for i in chosen]
        began = time.perf_counter()
        if self._unread is not None:
            self._unread.read(drafting)
        adjustments = [self._adjustments.get(r.id) for r in drafting]
        drawing = None  # the drafter's own greedy walk
        if settings["temperature"].any() or any(adjustments):
            drawing = Drawing(settings[chosen], uniforms[chosen, : self.info.gamma], adjustments)
        anchors = np.array([r.tokens[-1] for r in drafting])
        wanted = drafter.drafting_pass(anchors)
        lengths_D = np.full(len(drafting), wanted.tokens_RP.shape[1])
        starts_D, rows_D = work.starts_R[chosen] + wanted.first, work.rows_R[chosen]
        step = self._pass(wanted.tokens_RP.ravel(), starts_D, lengths_D, rows_D, wanted.block)
        tokens_DG, drawn, *said = drafter.draft(step, self._on_device(anchors), drawing)
        told = [t.cpu().numpy() if t is not None else None for t in said]  # on a GPU this waits for the pass
        self._tally.draft_seconds += time.perf_counter() - began - (drawing.seconds if drawing is not None else 0.0)
        confidence = self._planner.confidence(*told)
        lengths_A[chosen] = self._planner.lengths(drafting, confidence)
        return Offered(place(tokens_DG, chosen, work.answering), drawn, lengths_A, chosen, confidence)

    def _read(self, work: Work, offered: Offered) -> tuple[Pass, ReadOut]:
        """One pass of the target over everything: anchors with their proposals, and chunks of prompts."""
        decoding = work.decoding
        flat = [np.array([r.tokens[-1] for r in work.requests[:decoding]], np.int64)]
        if offered.drafting:
            grid = np.concatenate([flat[0][:, None], offered.host_tokens_AG[:decoding]], 1)
            flat = [grid[np.arange(grid.shape[1]) <= offered.lengths_A[:decoding, None]]]
        for request, count in zip(work.requests[decoding:], work.counts_R[decoding:], strict=True):
            flat.append(np.array(request.tokens[request.computed : request.computed + count]))
        lengths_R = work.counts_R
        if offered.drafting:
            lengths_R = lengths_R.copy()
            lengths_R[: work.answering] += offered.lengths_A
        began = time.perf_counter()
        step = self._pass(np.concatenate(flat) if len(flat) > 1 else flat[0], work.starts_R, lengths_R, work.rows_R)
        wanted, scoring = None, list[Scoring]()
        if len(work.requests) > decoding:
            ends, starts = step.ends_R[: work.answering], step.ends_R[: work.answering] - offered.lengths_A - 1
            rows = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)] or [ends]
            scoring = to_score(work, step.firsts_R)
            wanted = self._on_device(np.concatenate(rows + [rows_S for _, rows_S in scoring]))
        layers = () if self._goes_unheard(work, offered) else self._models.feature_layers
        read = self._models.model.read(step, wanted, layers)
        self._tally.verify_seconds += time.perf_counter() - began
        return step, score(scoring, read) if scoring else read

    def _goes_unheard(self, work: Work, offered: Offered) -> bool:
        """Whether nobody will draft from what this step reads, so that it needs no features; its requests are deaf from then
        on."""
        if self._unread is None or offered.drafting:
            return False
        if len(work.requests) == work.decoding and (listening := self._planner.listening_in_rest) is not None:
            return not listening
        if any(request.table.heard for request in work.requests):  # in every step: asked before what takes longer
            running = len(self._scheduler.running)
            if not self._planner.rests_long(running) or any(self._planner.drafts(r, running) for r in work.requests):
                return False
            self._unread.leave(work.requests)
        return True

    def _verify(
        self, work: Work, offered: Offered, read: ReadOut, settings: np.ndarray, uniforms: np.ndarray
    ) -> Outcome:
        """The verdict on every proposal, and the next token of everybody who gets one; on the host."""
        if not work.answering:
            return Outcome.nothing(offered)
        adjustments = [self._adjustments.get(r.id) for r in work.requests[: work.answering]]
        told = any(r.params.logprobs is not None for r in work.requests[: work.answering])  # of the logits as they were
        logits = adjust_rows(read.logits_WV, offered, adjustments, in_place=not told)
        best = None if any(adjustments) else read.best_W
        began = time.perf_counter()
        accepted, following = verify_proposals(logits, best, offered, settings, uniforms[:, -2:])
        if self._models.device.type != "cpu":  # verifying is little there beside what it waits for: the end of the pass
            self._tally.verify_seconds += time.perf_counter() - began
        self._tally.rounds += sum(r.gamma > 0 for r in work.requests[: work.decoding])
        if offered.drafting:
            drafted = len(offered.drafting) * self.info.gamma
            self._tally.add_drafts(drafted, offered.lengths_A[offered.drafting], accepted[offered.drafting])
        if offered.confidence_DG is not None:
            chosen = offered.drafting
            self._planner.observe(offered.lengths_A[chosen], accepted[chosen])
            self._tally.add_confidences(offered.confidence_DG, offered.lengths_A[chosen], accepted[chosen])
        return Outcome(offered, accepted, following, read.logits_WV)

    def _extend(self, work: Work, step: Pass, read: ReadOut, outcome: Outcome) -> None:
        """The drafter listens to everything that the target has read."""
        if self._models.drafter is None or self._unread is None or read.features_TF is None:
            return
        began = time.perf_counter()
        drafter = self._models.drafter
        if len(step) == work.decoding:
            following = outcome.next_A
        else:
            following = self._following(work, step, outcome) if drafter.looks_ahead else step.tokens_T
        newcomers = work.answering > work.decoding and not drafter.looks_ahead  # one that looks ahead reads in order
        soon = newcomers and self._planner.looks(len(self._scheduler.running))
        if outcome.offered.drafting or len(step) > LONG or soon:
            drafter.extend(step, read.features_TF, self._on_device(following) if drafter.looks_ahead else None)
        else:
            self._unread.add(work.requests, step, read.features_TF, following)
        self._tally.draft_seconds += time.perf_counter() - began

    def _following(self, work: Work, step: Pass, outcome: Outcome) -> np.ndarray:
        """The token behind each token of the pass, int64 [T]."""
        next_tokens = np.roll(step.tokens_T, -1)
        last_kept = step.ends_R[: work.answering] - 1 - outcome.offered.lengths_A + outcome.accepted_A
        next_tokens[last_kept] = outcome.next_A
        for index in range(work.answering, len(work.requests)):
            request = work.requests[index]
            next_tokens[step.ends_R[index] - 1] = request.tokens[request.computed + int(work.counts_R[index])]
        return next_tokens

    def _pass(
        self, tokens_T: np.ndarray, starts_R: np.ndarray, lengths_R: np.ndarray, rows_R: np.ndarray, block: bool = False
    ) -> Pass:
        models = self._models
        tables = self._scheduler.tables_SB[rows_R]
        return Pass(tokens_T, starts_R, lengths_R, tables, models.pool.block_size, models.device, models.dtype, block)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._models.device)

    @property
    def _model_seconds(self) -> float:
        return self._tally.draft_seconds + self._tally.verify_seconds

    def _check(self, request_id: str, tokens: Sequence[int], params: SamplingParams) -> None:
        vocab, longest = self.info.vocab_size, self.info.max_length
        if request_id in self._requests:
            raise DataError(f"request {request_id} is there already; give every request a name of its own")
        if not 1 <= len(tokens) < longest:
            raise DataError(f"a prompt of {len(tokens)} tokens: give 1 to {longest - 1} (the context is {longest})")
        if params.max_tokens is not None and len(tokens) + params.max_tokens > longest:
            raise DataError(f"{len(tokens)} prompt + {params.max_tokens} new tokens: the context is {longest}; ask for less")
        allowed = params.allowed_token_ids
        for name, ids in (
            ("prompt", tokens),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", allowed or ()),
            ("bad_token_ids", [token for word in params.bad_token_ids for token in word]),
        ):
            wrong = next((t for t in ids if not 0 <= t < vocab), None)
            if wrong is not None:
                raise DataError(f"{name}: token id {wrong} is out of vocabulary; allowed are 0 to {vocab - 1}")
        if allowed is not None and not allowed:
            raise DataError("allowed_token_ids is empty: no token could follow; leave it out or give at least one id")


def _forget(planner: LengthPlanner, models: Models, request: Running) -> None:
    """A request gives up its row and its memory."""
    planner.forget(request.row)
    if request.table.blocks:
        models.forget(request.table.blocks[0])
