"""The CUDA kernels as `ops` wants them: its arguments to those of `torch.ops.ollamapy_cuda` (csrc/cuda/bind.cpp).

Weights are the planes that the Triton kernels read too; activations become int8 per 32 with float32 scales. Dots of a group are
exact integers, and floats are added over groups in one order (csrc/cuda/forms.cuh), so that a row's products have the same bits
at any number of rows and whichever of the two kernels makes them. Steps of many rows (`mma_rows` of the table) are Triton's:
there a float operation for each group costs more than decoding a matrix for torch.matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ollamapy.triton_kernels as triton_kernels
from ollamapy import cuda_extension
from ollamapy.cpu_kernels import DecoderLayer
from ollamapy.engine.batch import Batch, KVCache
from ollamapy.gguf.types import GGMLType
from ollamapy.reference import Activation
from ollamapy.triton_kernels import tuning
from ollamapy.triton_kernels.forms import GROUP
from ollamapy.triton_kernels.layout import Planes

MATVEC, MMA = 0, 1  # `Path` of csrc/cuda/args.h
MATVEC_MOST = 8  # rows that the matvec kernel takes
LONGEST_HEAD = 256  # of the rope kernel
TYPES = frozenset(
    GGMLType[name]
    for name in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()  # noqa: SIM905
)
"""What csrc/cuda/forms.h lists; Triton's kernels serve the others."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def kernels() -> Any:
    """`torch.ops.ollamapy_cuda`. Only for ops whose `needs` has seen that the library is there."""
    return cuda_extension.load()


@dataclass(frozen=True, slots=True, eq=False)
class Int8Rows:
    """Activations (n, K) as the matmuls take them: codes (K / 32, n, 32) uint8; scale and sums (K / 32, n, 2) int32."""

    q: Tensor
    meta: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Int8Rows:
        groups = columns // GROUP
        q = torch.empty(groups, rows, GROUP, dtype=torch.uint8, device=device)
        return cls(q, torch.empty(groups, rows, 2, dtype=torch.int32, device=device))

    @property
    def rows(self) -> int:
        return self.q.shape[1]


def objection(type: GGMLType) -> str:
    """Why the matmuls cannot take a type of weight; "" when they can."""
    return "" if type in TYPES else f"no int8 kernel for {type.name}"


def quantize(x: Tensor, up: Tensor | None = None, kind: Activation = "silu") -> Int8Rows:
    """x (n, K) float32, float16 or bfloat16 to int8; with `up`, act(x) * up. Rows may be parts of longer ones."""
    made = Int8Rows.empty(x.shape[0], x.shape[1], x.device)
    kernels().quantize(x, up, kind == "gelu_tanh", made.q, made.meta)
    return made


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float, post: Tensor | None = None) -> Int8Rows | None:
    """x (n, E) float32 += delta, or += the RMSNorm of delta by `post`, in place; the RMSNorm of the sum as int8."""
    made = None if weight is None else Int8Rows.empty(x.shape[0], x.shape[1], x.device)
    kernels().norm(x, delta, post, weight, eps, made and made.q, made and made.meta)
    return made


def matmul(x: Int8Rows, weight: Planes, out: Tensor, bias: Tensor | None = None, add: bool = False, path: int = -1) -> None:
    """x W^T + bias into `out` (n, N), or onto it.

    `path`: MATVEC or MMA; by the number of rows when not given. Either gives the same bits.
    """
    device = x.q.device
    absent = torch.empty(0, device=device)
    planes = [absent if p is None else p for p in (weight.low, weight.high, weight.scales, weight.d, weight.m)]
    if path < 0:
        path = MATVEC if x.rows <= matvec_rows(device) else MMA
    kernels().linear(x.q, x.meta, planes, int(weight.type), out, bias, add, path)


def matvec_rows(device: torch.device) -> int:
    """Up to so many rows the matvec kernel is used: dp4a has its issue slots to spare for two rows, not for four."""
    threshold: int = tuning.of(device).dp4a_rows
    return min(threshold, MATVEC_MOST)


def is_dense(x: Tensor) -> bool:
    """Whether x (n, K) has so many rows that a decoded matrix and torch.matmul are faster."""
    most: int = tuning.of(x.device).mma_rows
    return x.shape[0] > most


def linear(x: Tensor, weight: Planes, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N) in x's type."""
    if is_dense(x):
        decoded: Tensor = triton_kernels.load("linear")(x, weight, bias)
        return decoded
    out = torch.empty(x.shape[0], weight.shape[-2], dtype=x.dtype, device=x.device)
    if x.shape[0]:
        matmul(quantize(x), weight, out, bias)
    return out


class Int8:
    """`stack.Products` with the kernels of this file; Triton's (`floats`) where they cannot serve: experts, float types, caches
    that are not of plain floats. Int8 rows are made where activations are, by the norm or the gate; else by `project`."""

    def __init__(self, floats: Any) -> None:
        self._floats = floats

    def norm(self, x: Tensor, by: Any, branch: Tensor | None, readers: Sequence[Planes], dtype: torch.dtype) -> Any:
        if by.weight is None and branch is None:
            return x
        if by.weight is not None and not (readers and all(map(takes, readers))):
            return self._floats.norm(x, by, branch, readers, dtype)
        return add_norm(x, branch, by.weight, by.eps, by.post)

    def project(
        self, rows: Int8Rows | Tensor, weight: Planes, out: Tensor, bias: Tensor | None = None, add: bool = False
    ) -> Tensor:
        if not takes(weight):
            through: Tensor = self._floats.project(rows, weight, out, bias, add)
            return through
        matmul(rows if isinstance(rows, Int8Rows) else quantize(rows), weight, out, bias, add)
        return out

    def gated(
        self, rows: Int8Rows | Tensor, weights: Sequence[Planes], kind: Activation, down: Planes, dtype: torch.dtype
    ) -> Any:
        if not all(map(takes, (*weights, down))):
            return self._floats.gated(rows, weights, kind, down, dtype)
        made = rows if isinstance(rows, Int8Rows) else quantize(rows)
        both = torch.empty(made.rows, 2 * down.shape[-1], dtype=dtype, device=made.q.device)
        outs = [both] if len(weights) == 1 else list(both.chunk(2, dim=1))
        for weight, out in zip(weights, outs, strict=True):
            matmul(made, weight, out)
        gate, up = both.chunk(2, dim=1)
        return quantize(gate, up, kind)

    def place(
        self, qkv: Tensor, heads: int, turn: Any, batch: Batch, temper: Tensor | None, cache: KVCache, dtype: torch.dtype
    ) -> Tensor:
        if not turns(cache):
            through: Tensor = self._floats.place(qkv, heads, turn, batch, temper, cache, dtype)
            return through
        out = torch.empty(qkv.shape[0], heads, cache.key.shape[3], dtype=dtype, device=qkv.device)
        vectors = [out.new_empty(0) if vector is None else vector for vector in (turn.q_norm, turn.k_norm, temper)]
        where = batch.positions, batch.slot_mapping
        kernels().rope(qkv, turn.table, *where, vectors, turn.interleaved, turn.eps, out, cache.key, cache.value)
        return out

    def qkv_dtype(self, cache: KVCache, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if turns(cache) else dtype


def takes(weight: Planes) -> bool:
    return weight.type in TYPES


def turns(cache: KVCache) -> bool:
    """Whether the rope kernel writes to a cache."""
    return cache.key.dtype in FLOATS and max(cache.key.shape[3], cache.value.shape[3]) <= LONGEST_HEAD


def stack(layers: Sequence[DecoderLayer]) -> Any:
    """Triton's `Stack` with the kernels of this file, or why it cannot take the layers."""
    floats = triton_kernels.load("floats", {"floats": "stack.Floats"})()
    made = triton_kernels.load("stack")(layers, Int8(floats))
    return made if isinstance(made, str) else ByRows(made, made.by(floats))


@dataclass(frozen=True, slots=True)
class ByRows:
    """One stack's layers: by the kernels of this file, and for steps of many rows by Triton's."""

    int8: Any
    dense: Any

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        out: Tensor = (self.dense if is_dense(x) else self.int8)(x, *rest)
        return out
