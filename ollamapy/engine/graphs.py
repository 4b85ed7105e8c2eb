"""Decoding steps that a device records once and does again: CUDA graphs, by number of sequences and length of block tables.

A step that only decodes is padded to its bucket and copied into buffers that never move; its logits come from one replay
instead of some 300 launches, into memory that all buckets share. Padding rows read and write a block of the cache that no
sequence has. A bucket is recorded when it is used for the second time: the first one compiles its kernels, which cannot be done
while recording. So a server starts at once, and records what its load asks for. Knows no CUDA: `Accelerator.record` does it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ollamapy.engine.accelerator import Accelerator, Recorded
from ollamapy.engine.batch import Batch, Move
from ollamapy.engine.build import Parts, Shape, as_batch, fill
from ollamapy.engine.protocol import Plan
from ollamapy.engine.schedule import Schedule

Feed = Callable[[Tensor], None]
"""Writes the tokens of a step (n,) that the host does not know."""

log = logging.getLogger(__name__)

FIRST_TOKENS = 1024  # context of the shortest block tables; each longer bucket has four times that
FINE, COARSE = 8, 16  # buckets are multiples of FINE up to FINE_MOST sequences, of COARSE above
FINE_MOST = 64
MAX_BYTES = 256 << 20  # of recorded steps beside their logits: what `memory` keeps from the blocks for them
MAX_GRAPHS = 96  # the one that was not used for the longest time goes first


def seqs_bucket(count: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24 ... 64, 80, 96 ... that holds `count` sequences."""
    if count <= FINE:
        return 1 << (count - 1).bit_length()
    step = FINE if count <= FINE_MOST else COARSE
    return -(-count // step) * step


def width_bucket(width: int, block_size: int, context_length: int) -> int:
    """Blocks of the least bucket that holds tables of `width` blocks."""
    most = max(-(-context_length // block_size), width)
    bucket = -(-FIRST_TOKENS // block_size)
    while bucket < width:
        bucket *= 4
    return min(bucket, most)


def longest_context(plan: Plan) -> int:
    """Most tokens that a sequence may have."""
    return plan.max_context or plan.context_length


def recordable(step: Schedule) -> bool:
    """Whether a step does nothing but decode a token of each sequence, by the model's own weights."""
    return all(
        count == 1 and seq.pooling is None and not seq.adapters and seq.num_computed + step.ahead + 1 >= len(seq.token_ids)
        for seq, count in zip(step.sequences, step.num_tokens, strict=True)
    )


@dataclass(slots=True)
class _Bucket:
    """The buffers of one bucket, on each device, and what was recorded on them."""

    shape: Shape
    wide: list[Tensor]
    narrow: list[Tensor]
    batch: Batch
    recorded: Recorded | None = None
    used: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.shape.num_seqs, self.shape.width

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.wide, *self.narrow))


class Graphs:
    """Recorded steps of one model. `run` computes a batch's logits (n, V); `scratch` is the block of padding rows."""

    def __init__(self, run: Callable[[Batch], Tensor], accelerator: Accelerator, plan: Plan, scratch: int) -> None:
        self._run, self._accelerator, self._plan, self._scratch = run, accelerator, plan, scratch
        self._logits: Tensor | None = None  # of any bucket, once a step has told how many columns they have
        self._buckets: OrderedDict[tuple[int, int], _Bucket] = OrderedDict()
        self._pool_bytes = 0  # which all recordings share: none of it is given back before all of them are gone
        self._refused: set[tuple[int, int]] = set()  # there was no memory to record them
        self.off = ""  # why nothing is recorded any more
        self.num_recorded = self.num_replayed = self.num_evicted = 0

    @property
    def nbytes(self) -> int:
        """Memory of all that is recorded now, beside the logits."""
        return self._pool_bytes + sum(bucket.nbytes for bucket in self._buckets.values())

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Sequences and blocks of what is recorded now, in order of use."""
        return [key for key, bucket in self._buckets.items() if bucket.recorded is not None]

    @property
    def facts(self) -> dict[str, int | str]:
        """`state`: "on", or why nothing is recorded; then `steps` (sequences x blocks), `bytes`, and how many were replayed,
        evicted, and refused for want of memory."""
        if self.off:
            return {"state": self.off}
        steps = ", ".join(f"{seqs} x {blocks}" for seqs, blocks in sorted(self.keys)) or "none yet"
        state = "on" if len(self._accelerator.devices) == 1 else f"on, in pieces on {len(self._accelerator.devices)} devices"
        return {
            "state": state,
            "steps": steps,
            "bytes": self.nbytes,
            "replayed": self.num_replayed,
            "evicted": self.num_evicted,
            "refused": len(self._refused),
        }

    def logits(self, step: Schedule, feed: Feed | None = None) -> Tensor | None:
        """(n, V) float32, in memory that the next call overwrites; None for a step that is not recordable."""
        if self.off or not recordable(step):
            return None
        bucket = self._bucket(step)
        self._copy(step, bucket)
        if feed is not None:
            feed(bucket.batch.token_ids[: len(step)])
        if bucket.recorded is None and (self._logits is None or not bucket.used or bucket.key in self._refused):
            return self._launched(bucket)[: len(step)]
        assert self._logits is not None
        if bucket.recorded is None and not self._record(bucket, self._logits[: bucket.shape.num_seqs]):
            return self._launched(bucket)[: len(step)]
        assert bucket.recorded is not None
        bucket.recorded.replay()
        self.num_replayed += 1
        return self._logits[: len(step)]

    def _launched(self, bucket: _Bucket) -> Tensor:
        """(n, V) of a step that is not recorded."""
        logits = self._run(bucket.batch)
        if self._logits is None:
            self._logits = torch.empty(seqs_bucket(self._plan.max_num_seqs), logits.shape[1], device=logits.device)
        bucket.used = True  # only now: one that failed has not compiled all of its kernels
        return logits

    def drop(self) -> bool:
        """Gives all memory but that of the logits back; whether there was any. What is used from then on is recorded again."""
        held = bool(self.keys)
        self.num_evicted += len(self.keys)
        self._buckets.clear()
        self._pool_bytes = 0
        self._accelerator.release()
        return held

    def _bucket(self, step: Schedule) -> _Bucket:
        plan, sequences = self._plan, step.sequences
        width = width_bucket(max(seq.num_blocks for seq in sequences), plan.block_size, longest_context(plan))
        key = seqs_bucket(len(sequences)), width
        found = self._buckets.pop(key, None) or self._new(*key, len(sequences[0].block_tables))
        self._buckets[key] = found
        return found

    def _new(self, count: int, width: int, groups: int) -> _Bucket:
        shape = Shape(count, count, count, groups, width)
        devices = self._accelerator.devices
        wide = [torch.zeros(shape.num_wide, dtype=torch.int64, device=device) for device in devices]
        narrow = [torch.zeros(shape.num_narrow, dtype=torch.int32, device=device) for device in devices]
        longest = min(width * self._plan.block_size, longest_context(self._plan))
        batches = [as_batch(shape, *buffers, [1] * count, [longest] * count) for buffers in zip(wide, narrow, strict=True)]
        elsewhere = dict(zip(devices[1:], batches[1:], strict=True))
        return _Bucket(shape, wide, narrow, replace(batches[0], elsewhere=elsewhere))

    def _copy(self, step: Schedule, bucket: _Bucket) -> None:
        """The step to the bucket's buffers: two copies for each device."""
        shape = bucket.shape
        wide = self._accelerator.host(shape.num_wide, torch.int64)
        narrow = self._accelerator.host(shape.num_narrow, torch.int32)
        parts = shape.parts(wide.numpy(), narrow.numpy())
        parts.token_ids[:] = 0
        parts.tables[:] = 0
        fill(parts, step, self._plan.block_size)
        _pad(parts, len(step), self._scratch, self._plan.block_size)
        for buffers, source in ((bucket.wide, wide), (bucket.narrow, narrow)):
            for buffer in buffers:
                buffer.copy_(source, non_blocking=True)

    def _record(self, bucket: _Bucket, logits: Tensor) -> bool:
        """Whether that went well. Where it does not, no step is recorded from then on; where memory is short, not this one."""

        def run(move: Move) -> None:
            logits.copy_(self._run(replace(bucket.batch, move=move)))

        self._accelerator.release()  # or what torch holds unused would hide what this takes
        before = self._accelerator.reserved_bytes()
        try:
            bucket.recorded = self._accelerator.record(run)
        except torch.OutOfMemoryError:
            self._refuse(bucket.key)
            return False
        except Exception as error:  # a device that is lost fails again in the step itself
            self.off = f"off: recording a step of {bucket.shape.num_seqs} failed ({type(error).__name__}: {error})"
            log.exception("steps are not recorded any more")
            self._buckets.clear()
            return False
        taken = max(self._accelerator.reserved_bytes() - before, 0)
        self._pool_bytes += taken
        if self.nbytes > MAX_BYTES:
            bucket.recorded = None
            if taken > MAX_BYTES // 2:
                self._refuse(bucket.key)
            else:
                self.drop()
            return False
        self.num_recorded += 1
        log.info("recorded a step of %d sequences and %d blocks", *bucket.key)
        while len(self._buckets) > MAX_GRAPHS:
            self._buckets.popitem(last=False)
            self.num_evicted += 1
        return True

    def _refuse(self, key: tuple[int, int]) -> None:
        """One that takes too much; what it has taken comes back with all the rest only."""
        log.warning("no memory to record a step of %d sequences and %d blocks", *key)
        self._refused.add(key)
        self.drop()


def _pad(parts: Parts, count: int, scratch: int, block_size: int) -> None:
    """Rows from `count` on become sequences of one token, at position 0 of the block `scratch`."""
    rows = np.arange(len(parts.seq_lens))
    parts.query_start[0] = 0
    parts.query_start[1:] = rows + 1
    parts.positions[count:] = 0
    parts.logit_rows[:] = rows
    parts.seq_lens[count:] = 1
    parts.slots[:, count:] = scratch * block_size + (rows[count:] - count) % block_size
    parts.tables[:, count:] = scratch
