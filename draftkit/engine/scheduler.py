"""Who takes part in the next step, and who waits: continuous batching, chunks of prompts, memory, preemption.

Shapes: R requests, S rows of the engine (requests at a time), B blocks per request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.request import Request

SCORED = 256  # tokens of prompts that one step scores: of a vocabulary of 150,000 their logits are 150 MB


@dataclass(frozen=True)
class ScheduledBatch:
    """The requests of one step, those that decode first, then those that read the end of their prompt, then
    the rest.

    The first `decoding` read their last token (and a proposal after it), the first `answering` get a token in
    this step, and the others read `counts_R` known tokens from position `starts_R` on.
    """

    requests: list[Request]
    decoding: int
    answering: int
    rows_R: np.ndarray
    starts_R: np.ndarray
    counts_R: np.ndarray


class Scheduler:
    """Keeps the requests in order of arrival. `gamma` positions after the known tokens are reserved for
    proposals. `on_release` is told of each request that gives up its row.
    """

    def __init__(
        self,
        pool: BlockPool,
        rows: int,
        length: int,
        gamma: int,
        step_tokens: int,
        on_release: Callable[[Request], None],
    ) -> None:
        self.pool, self._ahead, self._step_tokens = pool, gamma + 1, step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens looked up at admission, tokens found
        self.tables_SB = np.zeros((rows, pool.blocks_for(length + self._ahead)), np.int64)
        self._free_rows = list(range(rows))[::-1]
        self._on_release = on_release

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free what it holds."""
        if request.row < 0:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._release(request)

    def schedule(self) -> ScheduledBatch:
        """Choose the requests of the next step, and give each the memory that it will write to.

        All that decode take part. What `step_tokens` leaves goes to prompts, oldest first, at least one block
        of them so that they always get on. When memory runs out the youngest request gives up its own and
        waits at the head of the queue, to be read again.
        """
        preempted = self._make_room()
        decoding: list[Request] = []
        reading: list[Request] = []
        for request in self.running:
            (decoding if request.decoding else reading).append(request)
        budget = max(self._step_tokens - len(decoding), self.pool.block_size)
        scorable = SCORED
        ends: list[tuple[Request, int]] = []
        middles: list[tuple[Request, int]] = []

        def take(request: Request) -> None:
            nonlocal budget, scorable
            count = min(budget, request.to_read)
            if request.unscored:
                count = min(count, scorable)
                scorable -= count
            budget -= count
            # else all but its last token was found in memory, and it decodes from the next step on; or it
            # waits
            if count:
                (ends if self._answers(request, count) else middles).append((request, count))

        for request in reading:
            take(request)
        while budget and self.waiting and not preempted and self._admit(self.waiting[0]):
            take(self.waiting.popleft())
        requests = decoding + [r for r, _ in ends + middles]
        return ScheduledBatch(
            requests,
            len(decoding),
            len(decoding) + len(ends),
            np.array([r.row for r in requests], np.int64),
            np.array([r.computed for r in requests], np.int64),
            np.array([1] * len(decoding) + [n for _, n in ends + middles], np.int64),
        )

    def _answers(self, request: Request, count: int) -> bool:
        return request.made == 0 and count == request.to_read

    def _make_room(self) -> bool:
        """Blocks for one round of everybody who runs; True when somebody had to go."""
        before = self.preemptions
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if self._grow(request):
                index += 1
            else:
                self._preempt(self.running[-1])
        return self.preemptions > before

    def _grow(self, request: Request) -> bool:
        table = request.table
        held = len(table.blocks)
        if not self.pool.grow(table, len(request.tokens) + self._ahead):
            return False
        if len(table.blocks) > held:
            self.tables_SB[request.row, held : len(table.blocks)] = table.blocks[held:]
        return True

    def _admit(self, request: Request) -> bool:
        """Give the first in the queue a row and memory for all its known tokens; False when there is not
        enough.

        A block per running request stays free, so that a newcomer does not push out an older one at once.
        """
        if not self._free_rows:
            return False
        known = request.tokens if not request.unscored else ()  # what is not read again has no logits
        table = self.pool.match(known)
        missing = self.pool.blocks_for(len(request.tokens) + self._ahead) - len(table.blocks)
        if missing + len(self.running) > self.pool.free:
            self.pool.release(table)
            return False
        request.row, request.table = self._free_rows.pop(), table
        self.tables_SB[request.row, : len(table.blocks)] = table.blocks
        request.computed = len(table.blocks) * self.pool.block_size
        if request.started is None:  # one that was preempted finds its own blocks, which is no news
            request.started = time.perf_counter()
            request.cached_tokens = min(request.computed, request.prompt_length)
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.computed
        self.running.append(request)
        self._grow(request)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        self._on_release(request)
        self.pool.release(request.table)
        self._free_rows.append(request.row)
        request.row = -1
