"""Float32 values of quantized tensors, in torch: the table of decoders and the one loop that drives them.

Equal to gguf-py bit for bit. Works a slice at a time, so that temporaries stay in the cache and below 16 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.types import TYPES, GGMLType, num_elements, tensor_nbytes
from ollamapy.quant import codebooks, kquants, legacy
from ollamapy.quant.codebooks import Stepped
from ollamapy.quant.legacy import Scaled

Decoder = Callable[[Tensor, Tensor], None]
"""Fills (n, block_size) float32 from (n, type_size) uint8."""

# Weights decoded at a time. All of SmolLM2 (135M weights, Q4_1), 2 threads: 0.26 s at 64 Ki, 0.19 s at 1 Mi, 0.19 s at 4 Mi.
CHUNK_WEIGHTS = 1 << 20


def _dense(dtype: torch.dtype) -> Decoder:
    def decode(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(dtype))

    return decode


def _product(parts: Callable[[Tensor], Scaled]) -> Decoder:
    def decode(blocks: Tensor, out: Tensor) -> None:
        values, scales = parts(blocks)
        runs = out.view(*scales.shape, -1)
        runs.copy_(values.view(runs.shape)).mul_(scales.unsqueeze(-1))

    return decode


def _scaled(parts: Callable[[Tensor], Stepped]) -> Callable[[Tensor], Scaled]:
    def scaled(blocks: Tensor) -> Scaled:
        values, scales, step = parts(blocks)
        return values, scales * step

    return scaled


CODEBOOKS: dict[GGMLType, Callable[[Tensor], Stepped]] = {
    GGMLType.IQ1_S: codebooks.iq1_s,
    GGMLType.IQ1_M: codebooks.iq1_m,
    GGMLType.IQ2_XXS: codebooks.iq2_xxs,
    GGMLType.IQ2_XS: codebooks.iq2_xs,
    GGMLType.IQ2_S: codebooks.iq2_s,
    GGMLType.IQ3_XXS: codebooks.iq3_xxs,
    GGMLType.IQ3_S: codebooks.iq3_s,
}

INTEGERS: dict[GGMLType, Callable[[Tensor], Scaled]] = {
    GGMLType.NVFP4: legacy.nvfp4,
    GGMLType.Q1_0: legacy.q1_0,
    GGMLType.Q2_0: legacy.q2_0,
    GGMLType.TQ1_0: kquants.tq1_0,
    GGMLType.TQ2_0: kquants.tq2_0,
    **{type: _scaled(parts) for type, parts in CODEBOOKS.items()},
}
"""Types of few values: (n, type_size) uint8 -> (n, block_size) int8 and float32 scales (n, S) of equal runs; their products are
the weights."""

DEQUANT: dict[GGMLType, Decoder] = {
    GGMLType.F32: _dense(torch.float32),
    GGMLType.F16: _dense(torch.float16),
    GGMLType.BF16: _dense(torch.bfloat16),
    GGMLType.F64: _dense(torch.float64),
    GGMLType.Q4_0: legacy.q4_0,
    GGMLType.Q4_1: legacy.q4_1,
    GGMLType.Q5_0: legacy.q5_0,
    GGMLType.Q5_1: legacy.q5_1,
    GGMLType.Q8_0: legacy.q8_0,
    GGMLType.IQ4_NL: legacy.iq4_nl,
    GGMLType.MXFP4: legacy.mxfp4,
    GGMLType.Q2_K: kquants.q2_k,
    GGMLType.Q3_K: kquants.q3_k,
    GGMLType.Q4_K: kquants.q4_k,
    GGMLType.Q5_K: kquants.q5_k,
    GGMLType.Q6_K: kquants.q6_k,
    GGMLType.IQ4_XS: kquants.iq4_xs,
    **{type: _product(parts) for type, parts in INTEGERS.items()},
}


def dequantize(data: Tensor, type: GGMLType, shape: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """The tensor's values: float32 of `shape` (torch order), on the data's device.

    `data` is uint8 of any shape with the bytes of `shape` in the file's order; `out`, when given, is filled and returned
    (contiguous, `shape`, any float dtype). Raises UnsupportedModel for types that hold no weights.
    """
    decode = DEQUANT.get(type)
    if decode is None:
        raise UnsupportedModel(f"tensor type {TYPES[type].name} holds no weights")
    assert data.dtype == torch.uint8 and data.numel() == tensor_nbytes(type, shape), (data.dtype, data.shape, type, shape)
    info = TYPES[type]
    blocks = data.reshape(-1, info.type_size)
    if blocks.storage_offset() % 8 and info.type_size % 2 == 0:
        blocks = blocks.clone()  # the decoders read float16 scales and dense values in place
    result = torch.empty(tuple(shape), dtype=torch.float32, device=data.device) if out is None else out
    flat = result.view(-1, info.block_size)
    step = CHUNK_WEIGHTS // info.block_size
    for start in range(0, num_elements(shape) // info.block_size, step):
        part = flat[start : start + step]
        if part.dtype == torch.float32:
            decode(blocks[start : start + step], part)
        else:
            values = torch.empty(part.shape, dtype=torch.float32, device=part.device)
            decode(blocks[start : start + step], values)
            part.copy_(values)
    return result
