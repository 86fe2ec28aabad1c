"""Which block of the KV memory holds what: a page table with reuse of common prefixes.

A block is `block_size` consecutive positions of all layers, of the target and of the drafter alike: one block
id addresses both pools, so a reused prefix brings the drafter's context along. A full block is known by its
tokens and by the block before it (a chain), exactly: keys are compared, not only hashed. Blocks that nobody
uses keep their content until the space is needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_ROOT = 0  # the link before the first block of every chain

Key = tuple[int, tuple[int, ...]]  # link of the block before, tokens of this block


@dataclass
class BlockTable:
    """Blocks of one request in order of position, and how far their content is known to the chain."""

    blocks: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)  # chain link of each full, registered block


@dataclass
class _Block:
    users: int = 0
    key: Key | None = None


class BlockPool:
    """Hands out blocks and takes them back. `free` counts blocks that can be handed out now, cached ones
    included."""

    def __init__(self, num_blocks: int, block_size: int, reuse: bool = True) -> None:
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self._blocks = [_Block() for _ in range(num_blocks)]
        # Unused blocks, next to be handed out first: those without content come before those worth keeping.
        self._unused: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))
        self._known: dict[Key, tuple[int, int]] = {}  # key -> (block, link)
        self._next_link = _ROOT + 1

    @property
    def free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._unused)

    @property
    def used(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - len(self._unused)

    def blocks_for(self, length: int) -> int:
        """Blocks that `length` positions need."""
        return -(-length // self.block_size)

    def match(self, tokens: Sequence[int]) -> BlockTable:
        """Blocks of the longest known prefix, now held by the caller. The last token is never included: it
        must be read again, for its logits."""
        table = BlockTable()
        if self.reuse:
            link, size = _ROOT, self.block_size
            for start in range(0, (len(tokens) - 1) // size * size, size):
                found = self._known.get((link, tuple(tokens[start : start + size])))
                if found is None:
                    break
                block, link = found
                self._hold(block)
                table.blocks.append(block)
                table.links.append(link)
        return table

    def grow(self, table: BlockTable, length: int) -> bool:
        """Make room for `length` positions; False, and nothing changes, when there are too few blocks."""
        missing = self.blocks_for(length) - len(table.blocks)
        if missing > len(self._unused):
            return False
        for _ in range(missing):
            block, _ = self._unused.popitem(last=False)
            entry = self._blocks[block]
            if entry.key is not None:
                del self._known[entry.key]
                entry.key = None
            entry.users = 1
            table.blocks.append(block)
        return True

    def register(self, table: BlockTable, tokens: Sequence[int], length: int) -> None:
        """The first `length` positions hold `tokens`: full blocks may from now on be found by others."""
        if not self.reuse:
            return
        size = self.block_size
        for index in range(len(table.links), length // size):
            before = table.links[-1] if table.links else _ROOT
            key = (before, tuple(tokens[index * size : (index + 1) * size]))
            found, own = self._known.get(key), table.blocks[index]
            if found is None:
                found = self._known[key] = (own, self._next_link)
                self._next_link += 1
                self._blocks[own].key = key
            # where another block holds the same, along its chain; ours is kept to ourselves
            table.links.append(found[1])

    def release(self, table: BlockTable) -> None:
        """Give all blocks back. The end of a chain is reused for new content before its beginning."""
        for block in reversed(table.blocks):
            entry = self._blocks[block]
            entry.users -= 1
            if entry.users == 0:
                self._unused[block] = None
                if entry.key is None:
                    self._unused.move_to_end(block, last=False)
        table.blocks.clear()
        table.links.clear()

    def forget(self) -> None:
        """Drop all cached content (weights changed, or a test wants a cold start)."""
        self._known.clear()
        for entry in self._blocks:
            entry.key = None

    def _hold(self, block: int) -> None:
        entry = self._blocks[block]
        if entry.users == 0:
            del self._unused[block]
        entry.users += 1
