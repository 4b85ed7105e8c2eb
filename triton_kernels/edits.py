"""What is done to logits before a draw, a launch each: changes of single ones, and masks of grammars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine.edits import Edits
from ollamapy.engine.transfer import sent

EDITED = 512  # tokens of a list at a time
MASKED = 1024  # logits of a program


@triton.jit
def edit_kernel(logits, heads, ids, values, never, size, stride, BLOCK: tl.constexpr):
    """heads (m, 12) int32: row; where biases, penalties and DRY begin and end (4); where ids of `never` begin and end (2);
    repeat, -frequency and -presence (float32); two for alignment. values: float32. A list is done before the next begins."""
    heads += tl.program_id(0) * 12
    logits += tl.load(heads).to(tl.int64) * stride
    repeat = tl.load(heads + 7).to(tl.float32, bitcast=True)
    frequency = tl.load(heads + 8).to(tl.float32, bitcast=True)
    presence = tl.load(heads + 9).to(tl.float32, bitcast=True)
    for kind in tl.static_range(3):
        end = tl.load(heads + 2 + kind)
        for base in range(tl.load(heads + 1 + kind), end, BLOCK):
            i = base + tl.arange(0, BLOCK)
            token = tl.load(ids + i, i < end, other=0)
            value = tl.load(values + i, i < end, other=0).to(tl.float32, bitcast=True)
            real = (i < end) & (token < size)
            x = tl.load(logits + token, real, other=0.0)
            if kind == 1:
                x = tl.where(x <= 0.0, x * repeat, tl.div_rn(x, repeat))
                value = value * frequency + presence
            tl.store(logits + token, x + value, real)
        tl.debug_barrier()
    end = tl.load(heads + 6)
    for base in range(tl.load(heads + 5), end, BLOCK):
        i = base + tl.arange(0, BLOCK)
        token = tl.load(never + i, i < end, other=0)
        tl.store(logits + token, tl.full((BLOCK,), float("-inf"), tl.float32), i < end)


@triton.jit
def forbid_kernel(logits, rows, bits, size, words, stride, BLOCK: tl.constexpr):
    """Of row rows[m], the BLOCK logits of one program: minus infinity where the bit of bits (m, words) int32 is 0. Nothing else
    is read or written."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(bits + tl.program_id(0) * words + i // 32, i < size, other=0)
    row = logits + tl.load(rows + tl.program_id(0)) * stride
    tl.store(row + i, tl.full((BLOCK,), float("-inf"), tl.float32), (i < size) & ((word >> (i % 32)) & 1 == 0))


def edit(logits: Tensor, edits: Edits) -> None:
    """Changes single logits, see `Edits`: one copy and one launch. Products are not rounded together with the sums after them:
    the bits are the host's."""
    rows, free = len(edits.rows), -len(edits.ids) % 4
    heads = np.zeros((rows, 12), dtype=np.int32)
    heads[:, 0], heads[:, 1:5], heads[:, 5:7] = edits.rows, edits.bounds, edits.spans
    heads[:, 7:10] = edits.factors.view(np.int32)
    parts = (heads.ravel(), edits.ids, np.zeros(free, dtype=np.int32), edits.values.view(np.int32))
    packed = sent(torch.from_numpy(np.concatenate(parts)), logits.device)
    ids, values = heads.size, heads.size + len(edits.ids) + free  # multiples of 4: 16 bytes, as compiled once for all
    args = (logits, packed, packed[ids:], packed[values:], edits.never, logits.shape[1], logits.stride(0))
    edit_kernel[(rows,)](*args, BLOCK=EDITED, num_warps=4, enable_fp_fusion=False)


def forbid(logits: Tensor, rows: Sequence[int], bits: NDArray[np.int32]) -> None:
    """Masks of rows, see `ollamapy.reference.sampling.forbid`: two copies, a bit for each token, and one launch."""
    if not rows:
        return
    size, words = logits.shape[1], bits.shape[1]
    where = sent(torch.tensor(rows, dtype=torch.int64), logits.device)
    grid = (len(rows), triton.cdiv(size, MASKED))
    args = (logits, where, sent(torch.from_numpy(bits), logits.device), size, words, logits.stride(0))
    forbid_kernel[grid](*args, BLOCK=MASKED, num_warps=4)
