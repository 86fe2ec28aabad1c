"""The block pool: no block leaks, none is shared by two requests that hold different tokens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from draftkit.engine.kv_cache import BlockPool, BlockTable

SIZE = 3


def test_a_known_prefix_is_found_but_never_the_last_token() -> None:
    pool = BlockPool(8, SIZE)
    tokens = list(range(9))
    first = pool.match(tokens)
    assert first.blocks == [] and pool.grow(first, 9)
    pool.register(first, tokens, 9)
    held = list(first.blocks)
    again = pool.match(tokens)
    assert again.blocks == held[:2]  # the third block holds the last token
    longer = pool.match([*tokens, 7])
    assert longer.blocks == held
    assert pool.match([1, *tokens]).blocks == []
    for table in (first, again, longer):
        pool.release(table)
    assert (pool.used, pool.free) == (0, 8)
    assert pool.match([*tokens, 7]).blocks == held  # content outlives its users


def test_the_same_block_after_another_prefix_is_not_the_same() -> None:
    pool = BlockPool(8, SIZE)
    for head in ([1, 2, 3], [4, 5, 6]):
        table = BlockTable()
        pool.grow(table, 6)
        pool.register(table, [*head, 7, 8, 9], 6)
    a, b = pool.match([1, 2, 3, 7, 8, 9, 0]), pool.match([4, 5, 6, 7, 8, 9, 0])
    assert len(a.blocks) == len(b.blocks) == 2
    assert not set(a.blocks) & set(b.blocks)


def test_the_oldest_unused_end_goes_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = BlockTable(), BlockTable()
    for table, tokens in ((old, [1] * 6), (new, [2] * 6)):
        pool.grow(table, 6)
        pool.register(table, tokens, 6)
    pool.release(old)
    pool.release(new)
    fresh = BlockTable()
    pool.grow(fresh, 3)
    assert len(pool.match([1] * 7).blocks) == 1  # its second block went
    assert len(pool.match([2] * 7).blocks) == 2


def test_without_reuse_nothing_is_found() -> None:
    pool = BlockPool(4, SIZE, reuse=False)
    table = BlockTable()
    pool.grow(table, 6)
    pool.register(table, [1] * 6, 6)
    pool.release(table)
    assert pool.match([1] * 7).blocks == []


class Pool(RuleBasedStateMachine):
    """Random life of requests; `memory` plays the KV memory: what was last written at each position of each
    block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, SIZE)
        # (block, offset) -> the whole prefix that it encodes
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.live: list[tuple[BlockTable, list[int], int]] = []  # table, tokens, positions written

    def write(self, table: BlockTable, tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            self.memory[table.blocks[position // SIZE], position % SIZE] = tuple(tokens[: position + 1])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def begin(self, tokens: list[int]) -> None:
        table = self.pool.match(tokens)
        cached = len(table.blocks) * SIZE
        assert cached < len(tokens)
        for position in range(cached):  # reused content is the content of exactly this prefix
            assert self.memory[table.blocks[position // SIZE], position % SIZE] == tuple(
                tokens[: position + 1]
            )
        if not self.pool.grow(table, len(tokens)):
            self.pool.release(table)
            return
        self.write(table, tokens, cached, len(tokens))
        self.pool.register(table, tokens, len(tokens))
        self.live.append((table, tokens, len(tokens)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=5), drafted=st.integers(0, 4))
    def go_on(self, data: st.DataObject, new: list[int], drafted: int) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        table, tokens, _ = self.live[index]
        if self.pool.grow(table, len(tokens) + len(new) + drafted):
            self.write(table, [*tokens, *new, *[9] * drafted], len(tokens), len(tokens) + len(new) + drafted)
            tokens = tokens + new  # the drafted ones are rejected
            self.pool.register(table, tokens, len(tokens))
            self.live[index] = (table, tokens, len(tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.release(table)

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @invariant()
    def everybody_reads_what_they_wrote(self) -> None:
        for table, tokens, length in self.live:
            for position in range(length):
                assert self.memory[table.blocks[position // SIZE], position % SIZE] == tuple(
                    tokens[: position + 1]
                )

    @invariant()
    def no_block_is_lost_or_twice_there(self) -> None:
        held = {block for table, _, _ in self.live for block in table.blocks}
        assert self.pool.used == len(held)
        assert self.pool.free == 10 - len(held)
        assert not held & set(self.pool._unused)


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPool = Pool.TestCase
