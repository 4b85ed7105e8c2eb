"""BlockManager: the paged KV pool. Who owns which block, which blocks hold a prefix that can be reused. No tensors.

A block is in one of three states, and `check` proves it:
    free     referenced by nobody, content worthless
    cached   referenced by nobody, content known by its group and hash; evicted oldest first when free blocks run out
    used     in block tables of as many sequences as it has references
A sequence has a block table per layer group (see groups.py). All tables have the same length; entries of a windowed group that
lie behind the window are GONE, their blocks given back. Only full blocks are shared.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListLike
from typing import NamedTuple

from ollamapy.engine.block_check import GONE, Books, num_gone, problems_of
from ollamapy.engine.block_hash import BlockHash
from ollamapy.engine.groups import most_blocks, most_tokens
from ollamapy.engine.sequence import Sequence


class Hit(NamedTuple):
    """Leading tokens of a sequence that the pool holds: a table per group. The last block may be partly theirs."""

    num_tokens: int
    tables: list[array[int]]

    @property
    def num_blocks(self) -> int:
        return len(self.tables[0])


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, for groups of layers with these windows (0: none), of which
    sequences compute at most `step_tokens` in a step. Prefix blocks are known by `hash`, keyed with `key`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: bool = True,
        windows: ListLike[int] = (0,),
        step_tokens: int = 0,
        key: bytes = b"",
    ) -> None:
        self.num_blocks, self.block_size, self.prefix_cache, self.windows = num_blocks, block_size, prefix_cache, windows
        self._step_tokens = step_tokens
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # last in, first out: the memory touched last is in the CPU's cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._known: list[tuple[int, bytes] | None] = [None] * num_blocks  # group and hash of a block's content
        self._block_of: list[dict[bytes, int]] = [{} for _ in windows]
        self.hash = BlockHash(block_size, key)
        self.copies: list[tuple[int, int]] = []  # from, to: whose content is to be copied, in this order, before the next step
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones at the price of their content."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Length of the block tables of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def max_tokens(self, limit: int) -> int:
        """Tokens, at most `limit`, of a sequence that can be run when it has the pool to itself."""
        return most_tokens(limit, self.num_blocks, self.windows, self.block_size, self._step_tokens)

    def needed(self, seq: Sequence, found: Hit | None = None) -> int:
        """Blocks that the whole context of `seq` still takes, beside those it has or those of `found`."""
        tables = found.tables if found else seq.block_tables
        total = 0
        for group, window in enumerate(self.windows):
            table: ListLike[int] = tables[group] if tables else ()
            missing = max(self.blocks_for(len(seq.token_ids)) - len(table), 0)  # a draft may have more
            if window:
                live = len(table) - num_gone(table)
                missing = min(missing, max(most_blocks(window, self.block_size, self._step_tokens) - live, 0))
            total += missing
        copied = len(self.windows) * bool(found.num_tokens % self.block_size) if found else len(self._shared_tails(seq))
        return total + copied

    def room(self, seq: Sequence) -> int:
        """Tokens of `seq` that can be computed with the blocks it has and those that are left."""
        left = self.num_available - len(self._shared_tails(seq))
        return max((seq.num_blocks + left // len(self.windows)) * self.block_size - seq.num_computed, 0) if left >= 0 else 0

    # --- prefixes ---------------------------------------------------------------------------------------------

    def lookup(self, seq: Sequence, reuse: bool = True) -> Hit:
        """Blocks of the pool that hold the leading tokens of `seq`; never its last token, whose result is wanted.

        Groups without a window need all blocks of the prefix, those with one only what the next token can see.
        """
        end = self.reusable(seq, lambda group, digest: digest in self._block_of[group]) if reuse and self.prefix_cache else 0
        return Hit(end * self.block_size, [self._table(seq, group, end) for group in range(len(self.windows))])

    def reusable(self, seq: Sequence, has: Callable[[int, bytes], bool]) -> int:
        """How many leading blocks of `seq` need not be computed where `has` says which blocks (group, hash) there are."""
        most = (len(seq.token_ids) - 1) // self.block_size
        full = [group for group, window in enumerate(self.windows) if not window]
        end = 0
        while end < most and all(has(group, self.hash(seq, end)) for group in full):
            end += 1
        while end:
            missing = next((index for index, group in self.seen(end) if not has(group, self.hash(seq, index))), None)
            if missing is None:
                break
            end = missing
        return end

    def seen(self, end: int) -> Iterator[tuple[int, int]]:
        """Index and windowed group of the blocks that the token after `end` blocks sees, from the last."""
        for group, window in enumerate(self.windows):
            if window:
                for index in range(end - 1, self.first_seen(window, end * self.block_size) - 1, -1):
                    yield index, group

    def _table(self, seq: Sequence, group: int, end: int) -> array[int]:
        start = self.first_seen(self.windows[group], end * self.block_size)
        known = self._block_of[group]
        return array("i", [GONE] * start + [known[self.hash(seq, index)] for index in range(start, end)])

    def first_seen(self, window: int, position: int) -> int:
        """The first block that a token at `position` sees through a window."""
        return max(position - window + 1, 0) // self.block_size if window else 0

    def num_unreferenced(self, found: Hit) -> int:
        return sum(block != GONE and not self._references[block] for table in found.tables for block in table)

    def share(self, seq: Sequence, found: Hit) -> None:
        """Makes `found` (from `lookup`, in the same step) the head of the block tables of `seq`, which are empty."""
        assert not seq.block_tables
        for table in found.tables:
            for block in table:
                if block == GONE:
                    continue
                if not self._references[block]:
                    del self._cached[block]
                self._references[block] += 1
        seq.block_tables = found.tables
        seq.num_registered = found.num_tokens // self.block_size
        seq.num_computed = found.num_tokens
        self._give_back(seq)

    def register(self, seq: Sequence) -> None:
        """After a step: offers the blocks that computed tokens have filled since the last call to the prefix cache, and gives
        back those behind a window."""
        full = seq.num_computed // self.block_size
        if self.prefix_cache and full > seq.num_registered:
            for index in range(seq.num_registered, full):
                digest = self.hash(seq, index)
                for group, table in enumerate(seq.block_tables):
                    self._name(table[index], group, digest)
            seq.num_registered = full
        self._give_back(seq)

    def find(self, group: int, digest: bytes) -> int | None:
        """The block with this content."""
        return self._block_of[group].get(digest)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Cached blocks with this content become the last to be evicted, the first of a chain after the others."""
        for digest in reversed(list(digests)):
            for known in self._block_of:
                if (block := known.get(digest)) is not None and block in self._cached:
                    self._cached.move_to_end(block)

    def adopt(self, group: int, digest: bytes) -> int | None:
        """A block that the caller fills with this content, cached. None when the pool has it already or has no room."""
        if digest in self._block_of[group] or not self.num_available or not self.prefix_cache:
            return None
        block = self._take()
        self._name(block, group, digest)
        self._drop(block)
        return block

    def _name(self, block: int, group: int, digest: bytes) -> None:
        known = self._block_of[group]
        if digest not in known:  # else an equal block was computed beside this one; one of them is enough
            known[digest] = block
            self._known[block] = group, digest

    # --- blocks -----------------------------------------------------------------------------------------------

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for the first `num_tokens` tokens of `seq`. False, and nothing changed, when the pool has not so many blocks."""
        missing = self.blocks_for(num_tokens) - seq.num_blocks
        if missing * len(self.windows) + len(self._shared_tails(seq)) > self.num_available:
            return False
        if not seq.block_tables:
            seq.block_tables = [array("i") for _ in self.windows]
        for table in seq.block_tables:
            table.extend([self._take() for _ in range(missing)])
        self._own_tails(seq)
        return True

    def _tails(self, seq: Sequence) -> list[int]:
        """By group, the partly filled block that the next token of `seq` is written to."""
        index, offset = divmod(seq.num_computed, self.block_size)
        return [table[index] for table in seq.block_tables] if offset and index < seq.num_blocks else []

    def _shared_tails(self, seq: Sequence) -> list[int]:
        return [block for block in self._tails(seq) if self._references[block] > 1]

    def _own_tails(self, seq: Sequence) -> None:
        """Before it is written to: a block that others hold is copied, one that a former sibling has left loses its name."""
        index = seq.num_computed // self.block_size
        for group, block in enumerate(self._tails(seq)):
            if self._references[block] > 1:
                own = self._take()
                self.copies.append((block, own))
                self._drop(block)
                seq.block_tables[group][index] = own
            elif self._known[block] is not None:
                self._forget(block)

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Takes back the blocks beyond the first `num_tokens` tokens of `seq`, which were for guesses that proved wrong."""
        assert num_tokens >= seq.num_computed
        keep = self.blocks_for(num_tokens)
        for table in seq.block_tables:
            for block in reversed(table[keep:]):
                self._drop(block)
            del table[keep:]

    def release(self, seq: Sequence, forget: bool = False) -> None:
        """Takes the blocks of `seq` back. `forget`: what it alone has written is not trusted and is not kept for reuse."""
        for table in seq.block_tables:
            for block in reversed(table):  # the tail is evicted before the head that more prompts share
                if block != GONE:
                    self._drop(block, forget)
        seq.block_tables = []
        seq.num_computed = seq.num_registered = 0

    def _give_back(self, seq: Sequence) -> None:
        """Blocks that no later token of `seq` sees."""
        for window, table in zip(self.windows, seq.block_tables, strict=True):
            if not window:
                continue
            index = self.first_seen(window, seq.num_computed) - 1
            while index >= 0 and table[index] != GONE:
                self._drop(table[index])
                table[index] = GONE
                index -= 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.num_evictions += 1
        self._references[block] = 1
        return block

    def _drop(self, block: int, forget: bool = False) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if forget:
            self._forget(block)
        if self._known[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        known = self._known[block]
        if known is not None:
            del self._block_of[known[0]][known[1]]
            self._known[block] = None

    def check(self, sequences: Iterable[Sequence]) -> list[str]:
        """What is wrong with the books, given all sequences that may hold blocks; empty when nothing is."""
        return problems_of(self, sequences)

    def books(self) -> Books:
        """What the manager believes, for `check`."""
        return Books(self._references, self._free, self._cached, self._known, self._block_of)
