"""BlockManager: the paged KV pool. Who owns which block, which blocks hold a prefix that can be reused. No tensors.

A block is in one of three states, and `check` proves it:
    free     referenced by nobody, content worthless
    cached   referenced by nobody, content known by its group and hash; evicted oldest first when free blocks run out
    used     in block tables of as many sequences as it has references
A sequence has a block table per layer group (see groups.py). All tables have the same length; entries of a windowed group that
lie behind the window are GONE, their blocks given back. Only full blocks are shared.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from typing import NamedTuple

from ollamapy.engine.groups import blocks_of, most_blocks
from ollamapy.engine.sequence import Sequence

GONE = -1  # a table's entry behind the window


class Hit(NamedTuple):
    """Leading blocks of a sequence that the pool holds: a table per group. `num_blocks` is their length."""

    num_blocks: int
    tables: list[array[int]]


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, for groups of layers with these windows (0: none), of which
    sequences compute at most `step_tokens` in a step.

    Prefix blocks are known by a hash that covers their tokens, all before them (a chain) and what else keys and values depend
    on or may be shared by (`Sequence.salt`). It is 128 bits long and keyed with a secret, `key`, so two different prefixes
    never meet, not even by intent.
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
        self._key = key or secrets.token_bytes(16)
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
        size = self.block_size
        while limit > 0 and blocks_of(limit, self.windows, size, self._step_tokens) > self.num_blocks:
            limit = (limit - 1) // size * size
        return limit

    def needed(self, seq: Sequence, found: Hit | None = None) -> int:
        """Blocks that the whole context of `seq` still takes, beside those it has or those of `found`."""
        tables = found.tables if found else seq.block_tables
        total = 0
        for group, window in enumerate(self.windows):
            table: ListLike[int] = tables[group] if tables else ()
            missing = max(self.blocks_for(len(seq.token_ids)) - len(table), 0)  # a draft may have more
            if window:
                live = len(table) - _num_gone(table)
                missing = min(missing, max(most_blocks(window, self.block_size, self._step_tokens) - live, 0))
            total += missing
        return total

    def room(self, seq: Sequence) -> int:
        """Tokens of `seq` that can be computed with the blocks it has and those that are left."""
        return (seq.num_blocks + self.num_available // len(self.windows)) * self.block_size - seq.num_computed

    # --- prefixes ---------------------------------------------------------------------------------------------

    def lookup(self, seq: Sequence, reuse: bool = True) -> Hit:
        """Blocks of the pool that hold the leading tokens of `seq`; never its last token, whose result is wanted.

        Groups without a window need all blocks of the prefix, those with one only what the next token can see.
        """
        most = (len(seq.token_ids) - 1) // self.block_size if reuse and self.prefix_cache else 0
        end = 0
        while end < most and all(
            window or self.hash(seq, end) in known for window, known in zip(self.windows, self._block_of, strict=True)
        ):
            end += 1
        while end and (missing := self._last_missing(seq, end)) is not None:
            end = missing
        return Hit(end, [self._table(seq, group, end) for group in range(len(self.windows))])

    def _last_missing(self, seq: Sequence, end: int) -> int | None:
        """The last block that a windowed group lacks to go on after `end` blocks."""
        for window, known in zip(self.windows, self._block_of, strict=True):
            if not window:
                continue
            for index in range(end - 1, self._first_seen(window, end * self.block_size) - 1, -1):
                if self.hash(seq, index) not in known:
                    return index
        return None

    def _table(self, seq: Sequence, group: int, end: int) -> array[int]:
        start = self._first_seen(self.windows[group], end * self.block_size)
        known = self._block_of[group]
        return array("i", [GONE] * start + [known[self.hash(seq, index)] for index in range(start, end)])

    def _first_seen(self, window: int, position: int) -> int:
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
        seq.num_registered = found.num_blocks
        seq.num_computed = found.num_blocks * self.block_size

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

    def _name(self, block: int, group: int, digest: bytes) -> None:
        known = self._block_of[group]
        if digest not in known:  # else an equal block was computed beside this one; one of them is enough
            known[digest] = block
            self._known[block] = group, digest

    def hash(self, seq: Sequence, index: int) -> bytes:
        """Of block `index` of `seq` and of all before it; computed once per sequence."""
        hashes, size = seq.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hashlib.blake2b(seq.salt, digest_size=16, key=self._key).digest()
            content = parent + seq.token_ids[start : start + size].tobytes()
            hashes.append(hashlib.blake2b(content, digest_size=16, key=self._key).digest())
        return hashes[index]

    # --- blocks -----------------------------------------------------------------------------------------------

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for the first `num_tokens` tokens of `seq`. False, and nothing changed, when the pool has not so many blocks."""
        missing = self.blocks_for(num_tokens) - seq.num_blocks
        if missing * len(self.windows) > self.num_available:
            return False
        if not seq.block_tables:
            seq.block_tables = [array("i") for _ in self.windows]
        for table in seq.block_tables:
            table.extend([self._take() for _ in range(missing)])
        return True

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
            index = self._first_seen(window, seq.num_computed) - 1
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

    # --- check ------------------------------------------------------------------------------------------------

    def check(self, sequences: Iterable[Sequence]) -> list[str]:
        """What is wrong with the books, given all sequences that may hold blocks; empty when nothing is."""
        sequences = [seq for seq in sequences if seq.block_tables]
        problems = [problem for seq in sequences for problem in self._check_tables(seq)]
        held = Counter(block for seq in sequences for table in seq.block_tables for block in table if block != GONE)
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            problems.append("a block is free twice")
        if free & cached or free & held.keys() or cached & held.keys():
            problems.append("a block is in two states")
        if len(free) + len(cached) + len(held) != self.num_blocks:
            problems.append(f"{len(free)} free + {len(cached)} cached + {len(held)} used != {self.num_blocks} blocks")
        wrong = [block for block, count in enumerate(self._references) if count != held.get(block, 0)]
        if wrong:
            problems.append(f"references of blocks {wrong[:8]} do not match the block tables")
        named = {(group, digest): block for group, known in enumerate(self._block_of) for digest, block in known.items()}
        if any(self._known[block] != name for name, block in named.items()):
            problems.append("a prefix hash names a block of other content")
        if sum(name is not None for name in self._known) != len(named):
            problems.append("a block keeps a hash that the prefix cache does not know")
        if any(self._known[block] is not None for block in free) or any(self._known[block] is None for block in cached):
            problems.append("a free block has a hash or a cached one has none")
        return problems

    def _check_tables(self, seq: Sequence) -> list[str]:
        problems = []
        blocks = [block for table in seq.block_tables for block in table if block != GONE]
        if len(set(blocks)) != len(blocks):
            problems.append("a block is twice in the tables of one sequence")
        if len(seq.block_tables) != len(self.windows) or len({len(table) for table in seq.block_tables}) != 1:
            return [*problems, f"request {seq.request_id} has tables of different lengths"]
        for window, table in zip(self.windows, seq.block_tables, strict=True):
            gone, seen = _num_gone(table), self._first_seen(window, seq.num_computed)
            if gone != min(seen, len(table)) or GONE in table[gone:]:
                problems.append(f"request {seq.request_id} holds blocks behind a window of {window}, or lacks some within")
        return problems


def _num_gone(table: ListLike[int]) -> int:
    return next((index for index, block in enumerate(table) if block != GONE), len(table))
