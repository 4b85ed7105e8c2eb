"""BlockManager: the paged KV pool. Who owns which block, which blocks hold a prefix that can be reused. No tensors.

A block is in one of three states, and `check` proves it:
    free     referenced by nobody, content worthless
    cached   referenced by nobody, content known by its hash; evicted oldest first when free blocks run out
    used     in the block table of as many sequences as it has references
Only full blocks are shared. A block's hash covers its tokens and all before it (a chain), is 128 bits long and keyed with a
secret of this process, so two different prefixes never meet, not even by intent.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from ollamapy.engine.sequence import Sequence


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # last in, first out: the memory touched last is in the CPU's cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key = secrets.token_bytes(16)

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
        return -(-num_tokens // self.block_size)

    def lookup(self, seq: Sequence) -> list[int]:
        """Blocks of the pool that hold the leading tokens of `seq`; never its last token, whose result is wanted."""
        found: list[int] = []
        if self.prefix_cache:
            for index in range((len(seq.token_ids) - 1) // self.block_size):
                block = self._block_of.get(self._hash(seq, index))
                if block is None:
                    break
                found.append(block)
        return found

    def num_unreferenced(self, blocks: list[int]) -> int:
        return sum(not self._references[block] for block in blocks)

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Makes `blocks` (from `lookup`, in the same step) the head of the block table of `seq`, which is empty."""
        assert not seq.block_table
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
        seq.block_table.extend(blocks)
        seq.num_registered = len(blocks)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for the first `num_tokens` tokens of `seq`. False, and nothing changed, when the pool has not so many blocks."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            seq.block_table.append(block)
        return True

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Takes back the blocks beyond the first `num_tokens` tokens of `seq`, which were for guesses that proved wrong."""
        while len(seq.block_table) > self.blocks_for(num_tokens):
            block = seq.block_table.pop()
            assert self._references[block] == 1 and self._hash_of[block] is None
            self._references[block] = 0
            self._free.append(block)

    def register(self, seq: Sequence) -> None:
        """Offers the blocks that computed tokens have filled since the last call to the prefix cache."""
        full = seq.num_computed // self.block_size
        if not self.prefix_cache or full <= seq.num_registered:
            return
        for index in range(seq.num_registered, full):
            digest, block = self._hash(seq, index), seq.block_table[index]
            if digest not in self._block_of:  # else an equal block was computed beside this one; one of them is enough
                self._block_of[digest] = block
                self._hash_of[block] = digest
        seq.num_registered = full

    def release(self, seq: Sequence, forget: bool = False) -> None:
        """Takes the blocks of `seq` back. `forget`: what it alone has written is not trusted and is not kept for reuse."""
        for block in reversed(seq.block_table):  # the tail is evicted before the head that more prompts share
            self._references[block] -= 1
            if self._references[block]:
                continue
            if forget:
                self._unregister(block)
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
        seq.block_table = array("i")
        seq.num_computed = seq.num_registered = 0

    def check(self, sequences: Iterable[Sequence]) -> list[str]:
        """What is wrong with the books, given all sequences that may hold blocks; empty when nothing is."""
        problems = []
        tables = [seq.block_table for seq in sequences]
        held = Counter(block for table in tables for block in table)
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
        if any(len(set(table)) != len(table) for table in tables):
            problems.append("a block is twice in one table")
        if any(self._hash_of[block] != digest for digest, block in self._block_of.items()):
            problems.append("a prefix hash names a block of other content")
        if sum(digest is not None for digest in self._hash_of) != len(self._block_of):
            problems.append("a block keeps a hash that the prefix cache does not know")
        if any(self._hash_of[block] is not None for block in free) or any(self._hash_of[block] is None for block in cached):
            problems.append("a free block has a hash or a cached one has none")
        return problems

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unregister(block)
        return block

    def _unregister(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """Hash of block `index` of `seq` and of all before it; computed once per sequence."""
        hashes, size = seq.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            content = parent + seq.token_ids[start : start + size].tobytes()
            hashes.append(hashlib.blake2b(content, digest_size=16, key=self._key).digest())
        return hashes[index]
