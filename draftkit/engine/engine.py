"""The engine: many requests at once; each step drafts, plans, verifies everything in one flattened pass, and
commits.

Shapes: R requests of a step, A of them get a token, D of them draft, G = gamma drafted tokens, T tokens of
the pass, N rows of logits, V vocabulary, F features.
"""

from __future__ import annotations

import operator
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.drafter import Drafter
from draftkit.engine.adjust import Adjustment
from draftkit.engine.commit import Outcome, commit
from draftkit.engine.compiled import compile_models
from draftkit.engine.drawing import Drawing
from draftkit.engine.measure import measure_step_rate, warm_up
from draftkit.engine.metrics import EngineMetrics, Tally
from draftkit.engine.models import Models, build_models
from draftkit.engine.outputs import StepOutput
from draftkit.engine.paged_model import ReadOut
from draftkit.engine.passes import Pass
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.request import Request, Uniforms, check_request
from draftkit.engine.round import ProposalBatch, adjust_rows, place, verify_proposals
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.scheduler import ScheduledBatch, Scheduler
from draftkit.engine.scoring import Scoring, score, to_score
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError
from draftkit.ops.sampling import row_settings
from draftkit.schedule.step_rate import StepRate
from draftkit.target.transformers import TransformersTarget


class Engine:
    """Answers of many requests, step by step, in one thread. Passes are compiled and measured when it is
    made, and none is exchanged later; `compiled` says whether they could be.

    `target` and `drafter` are names (folder or hub id) or loaded models; a loaded drafter is moved to the
    target's device and dtype. Raises what loading them raises, ServeError when the memory is too small, and
    ScheduleError when a calibration does not fit the drafter.
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
        self._requests: dict[str, Request] = {}
        self._adjustments: dict[str, Adjustment] = {}
        self.calibration = settings.calibration
        if self.calibration is not None:
            self.calibration.check_gamma(self.info.gamma)
        self.compiled = settings.compile and compile_models(self._models)
        if self.compiled:
            self.info = replace(self.info, forward="compiled")
        if self.compiled and self._models.device.type == "cuda":
            warm_up(self._models, settings.max_running, settings.step_tokens)
        step_rate = self._step_rate(settings)
        self._planner = LengthPlanner(settings.max_running, self.info.gamma, step_rate, self.calibration)
        # nothing below an engine points back to it: one that is given up frees its memory at once
        self._scheduler = Scheduler(
            self._models.pool,
            settings.max_running,
            self.info.max_length,
            self.info.gamma,
            settings.step_tokens,
            partial(_forget, self._planner, self._models),
        )
        self._tally = Tally(self.info.gamma)

    def _step_rate(self, settings: EngineSettings) -> StepRate | None:
        """What steps cost, given or measured now; None where lengths are fixed."""
        if settings.plan != "planned" or self._models.drafter is None:
            return None
        return settings.step_rate or measure_step_rate(
            self._models, self._models.drafter, settings.max_running
        )

    def add_request(self, request_id: str, tokens: Sequence[int], params: SamplingParams) -> None:
        """Put a request in the queue. Raises DataError for one that cannot be served."""
        try:
            tokens = list(map(operator.index, tokens))
        except TypeError as error:
            raise DataError(f"a prompt is a list of token ids, which are whole numbers ({error})") from error
        if request_id in self._requests:
            raise DataError(f"request {request_id} is there already; give every request a name of its own")
        check_request(tokens, params, self.info.vocab_size, self.info.max_length)
        stop_ids: dict[int, int | None] = {t: t for t in params.stop_token_ids}
        if not params.ignore_eos:
            stop_ids |= dict.fromkeys(self._models.stop_token_ids)
        gamma = self.info.gamma if params.draft else 0
        seed = random.getrandbits(63) if params.seed is None else params.seed
        room = self.info.max_length - len(tokens)
        request = Request(
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
        if params.adjusts:
            like = torch.empty(0, device=self._models.device)
            self._adjustments[request_id] = Adjustment(
                params, tokens, list(stop_ids), self.info.vocab_size, like
            )
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
        """One round for all who decode, one chunk for prompts that are being read; what it adds to each
        answer."""
        began, before = time.perf_counter(), self._model_seconds
        batch = self._scheduler.schedule()
        if not batch.requests:
            return []
        settings, uniforms = self._randomness(batch)
        proposals = self._draft(batch, settings, uniforms)
        step, read = self._read(batch, proposals)
        outcome = self._verify(batch, proposals, read, settings, uniforms)
        self._extend(batch, step, read, outcome)
        outputs = commit(batch, outcome, self._adjustments, self._models.pool)
        for output in outputs:
            if output.finish_reason is not None:
                self.abort(output.request_id)
        seconds = time.perf_counter() - began
        if len(batch.requests) == batch.decoding:
            tokens = sum(len(output.events) for output in outputs)
            self._planner.record(batch.requests, proposals.drafting, tokens, seconds)
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
            gate=self._planner.gate_state,
        )

    # --- the parts of a step

    def _randomness(self, batch: ScheduledBatch) -> tuple[np.ndarray, np.ndarray]:
        """Sampling settings [A] of the requests that get a token, and their uniforms [A, G + 2] (drafts,
        length, token)."""
        answering = batch.requests[: batch.answering]
        settings = row_settings([r.params for r in answering])
        uniforms = np.zeros((batch.answering, self.info.gamma + 2))
        if settings["temperature"].any():
            for index, request in enumerate(answering):
                if index < batch.decoding:
                    drawn = request.uniforms.round()
                    uniforms[index, -len(drawn) :] = drawn
                else:
                    uniforms[index, -1] = request.uniforms.first()
        return settings, uniforms

    def _draft(self, batch: ScheduledBatch, settings: np.ndarray, uniforms: np.ndarray) -> ProposalBatch:
        """Proposals of those who draft, with the lengths that the plan lets through."""
        lengths_A = np.zeros(batch.answering, np.int64)
        chosen = self._planner.drafting(batch.requests[: batch.decoding])
        drafter, device = self._models.drafter, self._models.device
        if drafter is None or not chosen:
            empty = torch.empty(batch.answering, 0, dtype=torch.int64, device=device)
            return ProposalBatch(empty, None, lengths_A, [])
        drafting = [batch.requests[i] for i in chosen]
        began = time.perf_counter()
        adjustments = [self._adjustments.get(r.id) for r in drafting]
        drawing = None  # the drafter's own greedy walk
        if settings["temperature"].any() or any(adjustments):
            drawing = Drawing(settings[chosen], uniforms[chosen, : self.info.gamma], adjustments)
        anchors = np.array([r.tokens[-1] for r in drafting])
        wanted = drafter.drafting_pass(anchors)
        lengths_D = np.full(len(drafting), wanted.tokens_RP.shape[1])
        starts_D, rows_D = batch.starts_R[chosen] + wanted.first, batch.rows_R[chosen]
        step = self._pass(wanted.tokens_RP.ravel(), starts_D, lengths_D, rows_D, wanted.block)
        tokens_DG, drawn, *said = drafter.draft(step, self._on_device(anchors), drawing)
        # on a GPU this waits for the pass
        told, largest = (t.cpu().numpy() if t is not None else None for t in said)
        self._tally.draft_seconds += (
            time.perf_counter() - began - (drawing.seconds if drawing is not None else 0.0)
        )
        confidence = self._planner.confidence(told, largest)
        lengths_A[chosen] = self._planner.plan(drafting, confidence, batch.decoding - len(drafting))
        placed = place(tokens_DG, chosen, batch.answering)
        return ProposalBatch(placed, drawn, lengths_A, chosen, confidence, largest)

    def _read(self, batch: ScheduledBatch, proposals: ProposalBatch) -> tuple[Pass, ReadOut]:
        """One pass of the target over everything: anchors with their proposals, and chunks of prompts."""
        decoding = batch.decoding
        flat = [np.array([r.tokens[-1] for r in batch.requests[:decoding]], np.int64)]
        if proposals.drafting:
            grid = np.concatenate([flat[0][:, None], proposals.host_tokens_AG[:decoding]], 1)
            flat = [grid[np.arange(grid.shape[1]) <= proposals.lengths_A[:decoding, None]]]
        for request, count in zip(batch.requests[decoding:], batch.counts_R[decoding:], strict=True):
            flat.append(np.array(request.tokens[request.computed : request.computed + count]))
        lengths_R = batch.counts_R
        if proposals.drafting:
            lengths_R = lengths_R.copy()
            lengths_R[: batch.answering] += proposals.lengths_A
        began = time.perf_counter()
        step = self._pass(
            np.concatenate(flat) if len(flat) > 1 else flat[0], batch.starts_R, lengths_R, batch.rows_R
        )
        wanted, scoring = None, list[Scoring]()
        if len(batch.requests) > decoding:
            ends, starts = (
                step.ends_R[: batch.answering],
                step.ends_R[: batch.answering] - proposals.lengths_A - 1,
            )
            rows = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)] or [ends]
            if any(r.unscored for r in batch.requests):
                scoring = to_score(batch, step.firsts_R)
            wanted = self._on_device(np.concatenate(rows + [rows_S for _, rows_S in scoring]))
        read = self._models.model.read(step, wanted, self._models.feature_layers)
        self._tally.verify_seconds += time.perf_counter() - began
        return step, score(scoring, read) if scoring else read

    def _verify(
        self,
        batch: ScheduledBatch,
        proposals: ProposalBatch,
        read: ReadOut,
        settings: np.ndarray,
        uniforms: np.ndarray,
    ) -> Outcome:
        """The verdict on every proposal, and the next token of everybody who gets one; on the host."""
        if not batch.answering:
            return Outcome.nothing(proposals)
        adjustments = [self._adjustments.get(r.id) for r in batch.requests[: batch.answering]]
        # of the logits as they were
        told = any(r.params.logprobs is not None for r in batch.requests[: batch.answering])
        logits = adjust_rows(read.logits_WV, proposals, adjustments, in_place=not told)
        best = None if any(adjustments) else read.best_W
        began = time.perf_counter()
        accepted, following = verify_proposals(logits, best, proposals, settings, uniforms[:, -2:])
        # verifying is little there beside what it waits for: the end of the pass
        if self._models.device.type != "cpu":
            self._tally.verify_seconds += time.perf_counter() - began
        self._tally.rounds += sum(r.gamma > 0 for r in batch.requests[: batch.decoding])
        if chosen := proposals.drafting:
            lengths_D, kept_D = proposals.lengths_A[chosen], accepted[chosen]
            self._tally.add_drafts(len(chosen) * self.info.gamma, lengths_D, kept_D)
            if proposals.largest_DG is not None:
                self._planner.observe(proposals.largest_DG, lengths_D, kept_D)
            if proposals.confidence_DG is not None:
                self._tally.add_confidences(proposals.confidence_DG, lengths_D, kept_D)
        return Outcome(proposals, accepted, following, read.logits_WV)

    def _extend(self, batch: ScheduledBatch, step: Pass, read: ReadOut, outcome: Outcome) -> None:
        """The drafter reads everything that the target has read."""
        drafter = self._models.drafter
        if drafter is None or read.features_TF is None:
            return
        began = time.perf_counter()
        following = self._on_device(self._following(batch, step, outcome)) if drafter.looks_ahead else None
        drafter.extend(step, read.features_TF, following)
        self._tally.draft_seconds += time.perf_counter() - began

    def _following(self, batch: ScheduledBatch, step: Pass, outcome: Outcome) -> np.ndarray:
        """The token after each token of the pass, int64 [T]."""
        next_tokens = np.roll(step.tokens_T, -1)
        last_kept = step.ends_R[: batch.answering] - 1 - outcome.proposals.lengths_A + outcome.accepted_A
        next_tokens[last_kept] = outcome.next_A
        for index in range(batch.answering, len(batch.requests)):
            request = batch.requests[index]
            next_tokens[step.ends_R[index] - 1] = request.tokens[
                request.computed + int(batch.counts_R[index])
            ]
        return next_tokens

    def _pass(
        self,
        tokens_T: np.ndarray,
        starts_R: np.ndarray,
        lengths_R: np.ndarray,
        rows_R: np.ndarray,
        block: bool = False,
    ) -> Pass:
        models = self._models
        tables = self._scheduler.tables_SB[rows_R]
        return Pass(
            tokens_T, starts_R, lengths_R, tables, models.pool.block_size, models.device, models.dtype, block
        )

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._models.device)

    @property
    def _model_seconds(self) -> float:
        return self._tally.draft_seconds + self._tally.verify_seconds


def _forget(planner: LengthPlanner, models: Models, request: Request) -> None:
    """A request gives up its row and its memory."""
    planner.forget(request.row)
    if request.table.blocks:
        models.forget(request.table.blocks[0])
