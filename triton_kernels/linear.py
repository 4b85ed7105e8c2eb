"""Launches of the matmul kernels: which one serves how many rows, and how a product ends (bias, residual stream, gate).

All of them read the one copy of a weight. Up to `matvec_rows` rows are multiplied in float32 with activations as they come;
more go through tensor cores in the type of the device's activations (or, where the table says so, in int8); from `dense_rows`
rows on a layer is decoded to that type and left to torch. Float types always go through torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor
from ollamapy.reference import Activation
from ollamapy.triton_kernels import decode, int8, norm, tuning
from ollamapy.triton_kernels.activation import gated_activation
from ollamapy.triton_kernels.embedding import dequantize
from ollamapy.triton_kernels.forms import GROUP
from ollamapy.triton_kernels.layout import Planes, pack
from ollamapy.triton_kernels.matmul import end_kernel, matmul_kernel, matvec_kernel

DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}
END_SIZE = 512
DENSE_BLOCK = 64  # rows of one torch.matmul where bits must not depend on the batch: one shape, so one algorithm


def splits_of(programs: int, most: int, groups: int, step: int) -> tuple[int, int]:
    """How often K is split so that there are `most` programs, and groups per split: whole steps, and at least four of them."""
    wanted = max(min(most // programs, groups // (4 * step)), 1)
    span = triton.cdiv(triton.cdiv(groups, wanted), step) * step
    return triton.cdiv(groups, span), span


def _end(parts: Tensor, out: Tensor, bias: Tensor | None, gate: int, add: bool) -> Tensor:
    size = min(END_SIZE, triton.next_power_of_2(out.shape[1]))
    end_kernel[(out.shape[0], triton.cdiv(out.shape[1], size))](
        *(parts, out, out if bias is None else bias, *out.shape, out.stride(0)),
        SPLITS=parts.shape[0],
        GATE=gate,
        BIAS=bias is not None,
        ADD=add,
        SIZE=size,
    )
    return out


def matvec(
    x: Tensor,
    weight: Planes,
    out: Tensor,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    add: bool = False,
    experts: tuple[Tensor, int] | None = None,
) -> Tensor:
    """At most four rows, in float32: exact up to the rounding of sums. Into `out` (n, N), or onto it with `add`.

    With `gate`, the weight has the rows of gate, then those of up, and out act(gate) * up. `experts`: (places,) int32, out's
    rows, and how many places share a row of x; the weight is then (X, N, K), with `gate` (2, X, N, K).
    """
    assert weight.form is not None and x.is_contiguous() and out.stride(1) == 1
    table, columns, groups = tuning.of_weight(weight), out.shape[1], weight.shape[-1] // GROUP
    tile = table.matvec
    step = min(tile.groups, triton.next_power_of_2(groups))
    width = tile.columns // 2 if gate else tile.columns
    programs, places = triton.cdiv(columns, width), out.shape[0] if experts else 1
    splits, span = splits_of(programs * places, table.programs, groups, step)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, out.shape[0], columns * (2 if gate else 1), dtype=torch.float32, device=x.device)
    matvec_kernel[(programs, splits, places)](
        x,
        **decode.pointers(weight),
        out=parts,
        bias=out if bias is None else bias,
        expert_of=out if experts is None else experts[0],
        columns=columns,
        groups=groups,
        span=span,
        out_stride=out.stride(0),
        up_rows=weight.rows // 2 if gate else 0,
        M=1 if experts else x.shape[0],
        SPLIT=splits > 1,
        USED=experts[1] if experts else 0,
        GATE=GATES[gate],
        BIAS=bias is not None,
        ADD=add,
        EVEN=groups % step == 0,
        **decode.constants(weight.form),
        BN=tile.columns,
        GROUPS=step,
        num_warps=tile.num_warps,
    )
    return out if splits == 1 else _end(parts, out, bias, GATES[gate], add)


def matmul(
    x: Tensor,
    weight: Planes,
    out: Tensor,
    bias: Tensor | None = None,
    add: bool = False,
    dot: torch.dtype | None = None,
) -> Tensor:
    """Any number of rows, through tensor cores: x and the decoded weights are rounded to `dot`, sums are float32."""
    assert weight.form is not None and x.is_contiguous() and out.stride(1) == 1
    table, rows, columns, groups = tuning.of_weight(weight), x.shape[0], out.shape[1], weight.shape[-1] // GROUP
    tile = table.tile(rows)
    step = min(tile.groups, triton.next_power_of_2(groups))
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    splits, span = splits_of(grid[0] * grid[1], table.programs, groups, step)
    parts = out if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    matmul_kernel[(*grid, splits)](
        x,
        **decode.pointers(weight),
        out=parts,
        bias=out if bias is None else bias,
        row_of=x,
        expert_of=x,
        rows=rows,
        columns=columns,
        groups=groups,
        span=span,
        out_stride=out.stride(0),
        SPLIT=splits > 1,
        BIAS=bias is not None,
        ADD=add,
        USED=0,
        DOT=DOT_TYPES[dot or tuning.activations(x.device, weight.precise)],
        EVEN=groups % step == 0,
        **decode.constants(weight.form),
        BM=tile.rows,
        BN=tile.columns,
        GROUPS=step,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out if splits == 1 else _end(parts, out, bias, 0, add)


def int8_matmul(x: Tensor, weight: Planes, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """Any number of rows on int8 activations: a row's bits do not depend on the other rows."""
    parts = int8.launch(norm.quantize(x), weight, out, bias, add)
    return out if parts is out else _end(parts, out, bias, 0, add)


def choose_path(rows: int, weight: Planes) -> str:
    """ "dense" | "matvec" | "int8" | "tiles" | "layer" for a number of rows of x."""
    table = tuning.of_weight(weight)
    if weight.form is None:
        return "dense"
    if rows <= table.matvec_rows:
        return "matvec"
    if rows <= table.int8_rows:
        return "int8"
    return "tiles" if rows < table.dense_rows else "layer"


def project(
    x: Tensor,
    weight: Planes,
    out: Tensor,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    add: bool = False,
) -> Tensor:
    """x W^T + bias into `out` (n, N), or onto it with `add`: what every layer of `stack` calls.

    With `gate`, the weight has the rows of gate, then those of up, and out is act(gate) * up.
    """
    path = choose_path(x.shape[0], weight)
    if path == "matvec":
        return matvec(x, weight, out, bias, gate, add)
    if gate is not None:
        joined = project(x, weight, torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device))
        halves = joined.split(out.shape[1], 1)
        return gated_activation(halves[0], halves[1], gate, out)
    if path == "int8":
        return int8_matmul(x, weight, out, bias, add)
    if path == "tiles":
        return matmul(x, weight, out, bias, add)
    dense = dequantize(weight, tuning.activations(x.device)) if path == "layer" else weight.low
    dense = dense.float() if weight.precise else dense
    product = _dense_product(x.to(dense.dtype), dense.view(-1, x.shape[1]).t()).to(out.dtype)
    if bias is not None:
        product += bias
    return out.add_(product) if add else out.copy_(product)


def _dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, K) times weight (K, N); with OLLAMAPY_BATCH_INVARIANT in blocks of one shape, the last one filled with zeros."""
    if not tuning.invariant():
        return torch.matmul(x, weight)
    filled = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % DENSE_BLOCK))
    return torch.cat([torch.matmul(block, weight) for block in filled.split(DENSE_BLOCK)])[: x.shape[0]]


def prepare_linear(weight: QuantTensor, device: torch.device) -> Planes:
    """Packed on the device, a chunk of rows at a time. F16 becomes the type of the activations: those of a large model pass
    65504, which float16 does not hold, and what was trained in bfloat16 is rounded back without loss."""
    planes, dtype = pack(weight.to(device)), tuning.activations(device)
    return replace(planes, low=planes.low.to(dtype)) if weight.type is GGMLType.F16 else planes


def prepare_precise(weight: QuantTensor, device: torch.device) -> Planes:
    """The same, for products of float32: `precise` models."""
    return replace(pack(weight.to(device)), precise=True)


def linear(x: Tensor, weight: Planes, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N) in x's type."""
    out = torch.empty(x.shape[0], weight.shape[-2], dtype=x.dtype, device=x.device)
    return project(x.contiguous(), weight, out, bias) if x.shape[0] else out


def pad_rows(x: Tensor) -> Tensor:
    """The kernels take any number of rows."""
    return x
