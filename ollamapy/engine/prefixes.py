"""Prefixes: which blocks go to the PrefixStore and which come back, a bounded part of it per step. Knows no file and no policy
of scheduling.

A prefix is written once a second request has used it, answers and all: that shows that it is shared. Further answers of one
request, as its `n` choices, are no second one. It is read for a request when that is
cheaper than to compute it, by what both have cost before; the request waits outside the scheduler until its blocks are there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from ollamapy.engine.block_check import GONE
from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.prefix_reading import Pages, Reading
from ollamapy.engine.prefix_store import PrefixStore
from ollamapy.engine.sequence import Sequence

STEP_BYTES = 4 << 20  # copied to the store in one step: about 1 ms
RESTORE_BYTES = 32 << 20  # copied from it in one step
MAX_PENDING = 8192  # blocks that are to be written
MIN_TOKENS = 64  # a shorter prefix is not worth a file
UNMEASURED_TOKENS = 256  # nor is one of fewer tokens while the cost of a prefill is not known
READ_OVERHEAD = 0.005  # seconds
FIRST_BANDWIDTH = 5e8  # bytes per second, until one was measured
LEARNING = 0.2
IDLE_WAIT = 0.02  # seconds after which an engine that waits for files looks for commands


@dataclass(slots=True)
class Costs:
    """What reading and computing cost here, measured."""

    prefill: float = 0.0  # seconds per token; 0: not measured
    bandwidth: float = FIRST_BANDWIDTH

    def computed(self, num_tokens: int, seconds: float) -> None:
        self.prefill += (LEARNING if self.prefill else 1.0) * (seconds / num_tokens - self.prefill)

    def read(self, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            self.bandwidth += LEARNING * (num_bytes / max(seconds, 1e-6) - self.bandwidth)

    def worth_reading(self, num_tokens: int, num_bytes: int) -> bool:
        if num_tokens < (MIN_TOKENS if self.prefill else UNMEASURED_TOKENS):
            return False
        return not self.prefill or READ_OVERHEAD + num_bytes / self.bandwidth < self.prefill * num_tokens


@dataclass(slots=True)
class _Restore:
    """A request whose prefix is read and put into the pool."""

    seq: Sequence
    reading: Reading


class Prefixes:
    """Between one pool of blocks, the tensors that they name, and a store."""

    def __init__(self, blocks: BlockManager, tensors: ListLike[Tensor], store: PrefixStore) -> None:
        self.blocks, self.store, self.costs = blocks, store, Costs()
        self._rows = [tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in tensors]  # (blocks, bytes)
        self._sizes = [rows.shape[1] for rows in self._rows]  # of the parts of a page
        self._page_bytes = sum(self._sizes)
        self._pending: dict[bytes, int] = {}  # digest -> groups, as bits
        self._restoring: dict[int, _Restore] = {}  # by request id
        self.num_restored_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._pending or self._restoring)

    @property
    def num_waiting(self) -> int:
        return len(self._restoring)

    # --- to the store -------------------------------------------------------------------------------------------

    def note(self, sequences: ListLike[Sequence]) -> None:
        """Sequences of a step: of those that begin after a hit, the blocks of it are to be written."""
        if self.store.is_paused:
            return
        for seq in sequences:
            begins = seq.num_computed and seq.num_computed == seq.num_cached
            counts = not seq.params.later and not seq.params.adapters  # an adapter's file may change
            if begins and counts and self._long(seq.num_cached):
                self._want_written(seq, seq.num_cached // self.blocks.block_size)

    def _long(self, num_tokens: int) -> bool:
        return self.costs.worth_reading(num_tokens, self._bytes_of(num_tokens))

    def _bytes_of(self, num_tokens: int) -> int:
        return num_tokens // self.blocks.block_size * self._page_bytes * len(self.blocks.windows)

    def _want_written(self, seq: Sequence, count: int) -> None:
        for index in range(count):
            groups = sum(1 << group for group, table in enumerate(seq.block_tables) if table[index] != GONE)
            digest = self.blocks.hash(seq, index)
            if groups and not self.store.has(digest, groups) and len(self._pending) < MAX_PENDING:
                self._pending[digest] = self._pending.get(digest, 0) | groups

    def write_some(self) -> None:
        """Copies some of what is to be written, as far as the pool still has it."""
        if self.store.is_paused:
            self._pending.clear()
        left = STEP_BYTES
        while self._pending and left > 0 and not self.store.is_full:
            digest, groups = next(iter(self._pending.items()))
            pages = {}
            for group in range(len(self.blocks.windows)):
                block = self.blocks.find(group, digest) if groups >> group & 1 else None
                if block is not None:
                    pages[group] = self._copied(block)
                    left -= self._page_bytes
            if pages and not self.store.offer(digest, pages):
                return
            del self._pending[digest]

    def _copied(self, block: int) -> bytearray:
        page = bytearray(self._page_bytes)
        for part, rows in zip(self._parts(page), self._rows, strict=True):
            part.copy_(rows[block])
        return page

    def _parts(self, page: bytes | bytearray | memoryview) -> ListLike[Tensor]:
        """A page's bytes of each tensor, in its memory."""
        return torch.split(torch.frombuffer(page, dtype=torch.uint8), self._sizes)

    # --- from the store -----------------------------------------------------------------------------------------

    def begin(self, seq: Sequence) -> bool:
        """Whether the store has more of a new sequence's prefix than the pool, enough to wait for: it is being read then."""
        if seq.pooling is not None or seq.params.adapters or not self.blocks.prefix_cache:
            return False
        blocks, store = self.blocks, self.store
        here = blocks.lookup(seq).num_blocks
        there = blocks.reusable(
            seq, lambda group, digest: blocks.find(group, digest) is not None or store.has(digest, 1 << group)
        )
        if not self._long((there - here) * blocks.block_size):
            return False
        self._restoring[seq.request_id] = _Restore(seq, store.read(self._missing(seq, there)))
        return True

    def _missing(self, seq: Sequence, end: int) -> list[bytes]:
        """Hashes of the blocks of the store that the pool lacks to go on after `end` blocks of a sequence."""
        blocks = self.blocks
        full = [(index, group) for index in range(end) for group, window in enumerate(blocks.windows) if not window]
        wanted = sorted(
            {index for index, group in [*full, *blocks.seen(end)] if blocks.find(group, blocks.hash(seq, index)) is None}
        )
        return [blocks.hash(seq, index) for index in wanted]

    def abort(self, request_id: int) -> Sequence | None:
        found = self._restoring.pop(request_id, None)
        if found is None:
            return None
        found.reading.cancel()
        return found.seq

    def knows(self, request_id: int) -> bool:
        return request_id in self._restoring

    def restored(self, idle: bool) -> list[Sequence]:
        """Sequences whose wait is over. With nothing else to do (`idle`), waits a little for them, and for room to write."""
        if idle and not self._restoring and self.store.is_full:
            self.store.flush(IDLE_WAIT)
        done = []
        left, end = RESTORE_BYTES, time.monotonic() + IDLE_WAIT * idle
        for restore in list(self._restoring.values()):
            reading = restore.reading
            while left > 0 and (page := reading.next(end - time.monotonic())) is not None:
                left -= self._put(page.digest, page.pages)
                reading.done(page)
            if reading.has_ended:
                self.costs.read(reading.num_bytes, reading.seconds)
                self.blocks.touch(reading.digests)
                del self._restoring[restore.seq.request_id]
                done.append(restore.seq)
        return done

    def _put(self, digest: bytes, pages: Pages) -> int:
        """Bytes copied."""
        copied = 0
        for group, page in pages.items():
            block = self.blocks.adopt(group, digest) if len(page) == self._page_bytes else None
            if block is None:
                continue
            for part, rows in zip(self._parts(page), self._rows, strict=True):
                rows[block].copy_(part)
            copied += len(page)
        if copied:
            self.num_restored_tokens += self.blocks.block_size
        return copied

    def stats(self) -> dict[str, int]:
        """The figures of `protocol.Stats` that begin with `disk_`."""
        store = self.store
        return {
            "disk_bytes": store.num_bytes,
            "disk_written_blocks": store.num_written,
            "disk_read_tokens": self.num_restored_tokens,
            "disk_bad_files": store.num_bad,
            "disk_failed_writes": store.num_failed,
        }

    def check(self) -> list[str]:
        """What is wrong; empty when nothing is."""
        problems = self.store.check()
        if len(self._pending) > MAX_PENDING:
            problems.append(f"{len(self._pending)} blocks are to be written")
        if any(restore.seq.block_tables for restore in self._restoring.values()):
            problems.append("a request that waits for its prefix holds blocks")
        return problems
