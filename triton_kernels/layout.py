"""The packed weight layout of the GPU kernels: a tensor's bits as aligned planes, in plain torch. Knows no kernel.

A GGUF block mixes codes, scales and steps in 17 to 210 bytes, so its fields start at odd addresses. Here every field of a
tensor is a plane of its own: codes (low bits and high bits apart), group scales, steps. Packing permutes bits and adds none:
`unpack` gives the file's bytes back, and planes are as large as the tensor was.

The unit is a group of 32 consecutive weights of a row, seen as two halves of 16. Planes per group:
- low, 4 bits: 16 bytes, byte j holds weight j in its low and weight j + 16 in its high nibble
- low, 8 bits: 32 bytes; low or high, 2 bits: two int32, weight j of each half at bits 2j
- high, 1 bit: one int32, weight j at bit j
- scales: see `Scale`; a row's second kind of scale byte follows all of the first kind
- d and m: float16 (or the E8M0 byte), one per block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.legacy import FP4_VALUES, IQ4_VALUES
from ollamapy.quant.tensor import QuantTensor

GROUP = 32
CHUNK_WEIGHTS = 1 << 25  # packed at a time: codes are one byte each on the way, 32 MiB


class Scale(IntEnum):
    """How the scale of a group, or of its two halves, is stored."""

    STEP = 0  # d alone, one per group
    E8M0 = 1  # d is a power of two as a byte, one per group
    PAIRS = 2  # two 6-bit numbers per group: low nibbles in a byte, then the high bits of two groups in a byte
    BYTES = 3  # two int8 per group, one for each half
    NIBBLES = 4  # two bytes per group, one for each half: scale in the low nibble, min in the high nibble
    SIXES = 5  # one 6-bit number per group: low nibbles of two groups in a byte, then the high bits of four in a byte


class Field(NamedTuple):
    """Where a block keeps a code's bits: from byte `start`, runs of `width` bytes; a run's lowest bit fields come first."""

    start: int
    runs: int
    width: int
    bits: int

    @property
    def stop(self) -> int:
        return self.start + self.runs * self.width


class Form(NamedTuple):
    """A quantization type as the kernels see it; what is not of the layout is a parameter of the kernel templates."""

    low: Field
    high: Field | None
    scale: Scale
    d: int  # byte of the block's step
    m: int | None = None  # byte of its min (legacy types) or of the step of its mins (K-quants)
    scales: tuple[int, int] = (0, 0)  # bytes of the block's packed scales
    offset: int = 0  # subtracted from a code
    scale_offset: int = 0  # subtracted from a 6-bit scale
    table: tuple[int, int, int, int] = (0, 0, 0, 0)  # 16 int8 values of the codes, as four int32; zeros: a code is its value

    @property
    def two_scales(self) -> bool:
        """Whether the halves of a group have scales of their own."""
        return self.scale in (Scale.BYTES, Scale.NIBBLES) or (self.scale is Scale.PAIRS and self.m is None)


def _table(values: tuple[int, ...]) -> tuple[int, int, int, int]:
    words = [int.from_bytes(bytes(v & 255 for v in values[i : i + 4]), "little", signed=True) for i in (0, 4, 8, 12)]
    return words[0], words[1], words[2], words[3]


FORMS: dict[GGMLType, Form] = {
    GGMLType.Q4_0: Form(Field(2, 1, 16, 4), None, Scale.STEP, d=0, offset=8),
    GGMLType.Q4_1: Form(Field(4, 1, 16, 4), None, Scale.STEP, d=0, m=2),
    GGMLType.Q5_0: Form(Field(6, 1, 16, 4), Field(2, 4, 1, 1), Scale.STEP, d=0, offset=16),
    GGMLType.Q5_1: Form(Field(8, 1, 16, 4), Field(4, 4, 1, 1), Scale.STEP, d=0, m=2),
    GGMLType.Q8_0: Form(Field(2, 1, 32, 8), None, Scale.STEP, d=0),
    GGMLType.Q2_K: Form(Field(16, 2, 32, 2), None, Scale.NIBBLES, d=80, m=82, scales=(0, 16)),
    GGMLType.Q3_K: Form(
        Field(32, 2, 32, 2), Field(0, 1, 32, 1), Scale.PAIRS, d=108, scales=(96, 108), offset=4, scale_offset=32
    ),
    GGMLType.Q4_K: Form(Field(16, 4, 32, 4), None, Scale.PAIRS, d=0, m=2, scales=(4, 16)),
    GGMLType.Q5_K: Form(Field(48, 4, 32, 4), Field(16, 1, 32, 1), Scale.PAIRS, d=0, m=2, scales=(4, 16)),
    GGMLType.Q6_K: Form(Field(0, 2, 64, 4), Field(128, 2, 32, 2), Scale.BYTES, d=208, scales=(192, 208), offset=32),
    GGMLType.IQ4_NL: Form(Field(2, 1, 16, 4), None, Scale.STEP, d=0, table=_table(IQ4_VALUES)),
    GGMLType.IQ4_XS: Form(Field(8, 8, 16, 4), None, Scale.SIXES, d=0, scales=(2, 8), scale_offset=32, table=_table(IQ4_VALUES)),
    GGMLType.MXFP4: Form(Field(1, 1, 16, 4), None, Scale.E8M0, d=0, table=_table(FP4_VALUES)),
}
DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


@dataclass(slots=True, eq=False)
class Planes:
    """A weight (..., N, K) as planes (R, ...), R being the rows of all leading dimensions. Dense weights: `low` alone."""

    type: GGMLType  # as the file has it
    shape: tuple[int, ...]
    low: Tensor  # uint8, or int32 (2-bit codes), or the dense values (R, K)
    high: Tensor | None = None  # int32
    scales: Tensor | None = None  # uint8
    d: Tensor | None = None  # float16, or uint8 (E8M0)
    m: Tensor | None = None  # float16
    precise: bool = False  # multiplied in float32 by activations of float32, at any number of rows

    @property
    def form(self) -> Form | None:
        """None: dense."""
        return FORMS.get(self.type)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The planes that there are, by name."""
        every = {"low": self.low, "high": self.high, "scales": self.scales, "d": self.d, "m": self.m}
        return {name: plane for name, plane in every.items() if plane is not None}

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.tensors.values())

    @property
    def rows(self) -> int:
        return self.low.shape[0]


def _fields(data: Tensor, field: Field) -> Tensor:
    """(n, runs * width) bytes -> (n, codes) one byte each, in the order of the weights."""
    if field.bits == 8:
        return data
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    runs = data.view(data.shape[0], -1, 1, field.width)
    return (runs >> shifts).bitwise_and_((1 << field.bits) - 1).view(data.shape[0], -1)


def _bytes(codes: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_fields`."""
    if bits == 8:
        return codes
    parts = codes.view(codes.shape[0], -1, 8 // bits, width)
    packed = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, :, place] << (place * bits)
    return packed.view(codes.shape[0], -1)


def _plane_width(bits: int) -> int:
    return GROUP // 2 if bits == 4 else 1


def _to_pairs(packed: Tensor, of_mins: bool) -> Tensor:
    """12 bytes of a block -> eight pairs (n, 8, 2) of 6 bits: (scale, min) of Q4_K and Q5_K, or two scales of Q3_K."""
    if of_mins:
        scale, minimum, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
        scales = torch.cat([scale & 63, (both & 15) | (scale >> 2 & 48)], dim=1)
        return torch.stack([scales, torch.cat([minimum & 63, (both >> 4) | (minimum >> 2 & 48)], dim=1)], dim=2)
    low = _fields(packed[:, :8].contiguous(), Field(0, 1, 8, 4))
    high = _fields(packed[:, 8:].contiguous(), Field(0, 1, 4, 2))
    return (low | high << 4).view(-1, 8, 2)


def _from_pairs(pairs: Tensor, of_mins: bool) -> Tensor:
    """The inverse of `_to_pairs`."""
    if of_mins:
        scales, minima = pairs[..., 0], pairs[..., 1]
        tops = [first[:, :4] | (first[:, 4:] >> 4 << 6) for first in (scales, minima)]
        return torch.cat([*tops, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], dim=1)
    flat = pairs.reshape(-1, 16)
    return torch.cat([_bytes(flat & 15, 4, 8), _bytes(flat >> 4, 2, 4)], dim=1)


def _pack_scales(packed: Tensor, form: Form, rows: int) -> Tensor:
    """A block's scale bytes (blocks, S) -> (rows, bytes)."""
    if form.scale is Scale.PAIRS:
        pairs = _to_pairs(packed, form.m is not None)
        low = (pairs[..., 0] & 15) | (pairs[..., 1] & 15) << 4
        high = (pairs[..., 0] >> 4) | (pairs[..., 1] >> 4) << 2
        return torch.cat([low.reshape(rows, -1), _bytes(high.reshape(rows, -1), 4, 1)], dim=1)
    if form.scale is Scale.SIXES:
        return torch.cat([packed[:, 2:].reshape(rows, -1), packed[:, :2].reshape(rows, -1)], dim=1)
    return packed.reshape(rows, -1)


def _unpack_scales(plane: Tensor, form: Form, blocks: int) -> Tensor:
    """The inverse: (rows, bytes) -> (blocks of all rows, S)."""
    if form.scale is Scale.PAIRS:
        split = plane.shape[1] // 3 * 2
        low = plane[:, :split].reshape(blocks, 8)
        high = _fields(plane[:, split:].contiguous(), Field(0, 1, 1, 4)).view(blocks, 8)
        first, second = (low & 15) | (high & 3) << 4, (low >> 4) | (high >> 2) << 4
        return _from_pairs(torch.stack([first, second], dim=2), form.m is not None)
    if form.scale is Scale.SIXES:
        split = plane.shape[1] // 3 * 2
        return torch.cat([plane[:, split:].reshape(blocks, 2), plane[:, :split].reshape(blocks, 4)], dim=1)
    return plane.reshape(blocks, -1)


def _steps(blocks: Tensor, at: int, rows: int, dtype: torch.dtype) -> Tensor:
    return blocks[:, at : at + dtype.itemsize].contiguous().view(dtype).view(rows, -1)


def _pack_rows(data: Tensor, type: GGMLType, columns: int) -> Planes:
    form, rows = FORMS[type], data.shape[0]
    blocks = data.reshape(-1, TYPES[type].type_size)

    def plane(codes: Tensor, bits: int) -> Tensor:
        packed = _bytes(codes.view(rows, columns), bits, _plane_width(bits)).contiguous()
        return packed if bits >= 4 else packed.view(torch.int32)

    low, high = form.low, form.high
    first, last = form.scales
    step = torch.uint8 if form.scale is Scale.E8M0 else torch.float16
    return Planes(
        type,
        (rows, columns),
        low=plane(_fields(blocks[:, low.start : low.stop].contiguous(), low), low.bits),
        high=plane(_fields(blocks[:, high.start : high.stop].contiguous(), high), high.bits) if high else None,
        scales=_pack_scales(blocks[:, first:last], form, rows).contiguous() if last else None,
        d=_steps(blocks, form.d, rows, step),
        m=None if form.m is None else _steps(blocks, form.m, rows, torch.float16),
    )


def _in_chunks(rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    step = max(CHUNK_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        work(start, min(start + step, rows))


def pack(weight: QuantTensor) -> Planes:
    """The planes of a tensor, on its device. Types without a form become dense: float types as they are, others bfloat16."""
    columns = weight.shape[-1]
    data = weight.data.reshape(-1, weight.data.shape[-1])
    if weight.type not in FORMS:
        dtype = DENSE.get(weight.type)
        dense = weight.dequantize(torch.bfloat16) if dtype is None else weight.data.contiguous().clone().view(dtype)
        return Planes(weight.type, weight.shape, dense.view(-1, columns))
    parts: list[Planes] = []
    _in_chunks(data.shape[0], columns, lambda start, stop: parts.append(_pack_rows(data[start:stop], weight.type, columns)))
    whole = parts[0] if len(parts) == 1 else join(parts)
    return replace(whole, shape=weight.shape)


def join(parts: Sequence[Planes]) -> Planes:
    """The rows of several weights of one type and one K, one after the other, as one weight (R, K). The parts become views of
    it, so that there is one copy still."""
    first = parts[0]
    assert all(part.type is first.type and part.shape[-1] == first.shape[-1] for part in parts)
    counts = [part.rows for part in parts]
    joined = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
    for name, plane in joined.items():
        for part, rows in zip(parts, plane.split(counts), strict=True):
            setattr(part, name, rows)
    return Planes(first.type, (sum(counts), first.shape[-1]), **joined, precise=first.precise)


def _unpack_rows(planes: Planes, start: int, stop: int, blocks: Tensor) -> None:
    form, columns = FORMS[planes.type], planes.shape[-1]
    per_block = TYPES[planes.type].block_size

    def put(plane: Tensor, field: Field) -> None:
        raw = plane[start:stop].contiguous().view(torch.uint8)
        codes = _fields(raw, Field(0, 1, _plane_width(field.bits), field.bits)).view(-1, per_block)
        blocks[:, field.start : field.stop] = _bytes(codes, field.bits, field.width)

    put(planes.low, form.low)
    if planes.high is not None and form.high is not None:
        put(planes.high, form.high)
    if planes.scales is not None:
        blocks[:, slice(*form.scales)] = _unpack_scales(planes.scales[start:stop], form, (stop - start) * columns // per_block)
    for plane, at in ((planes.d, form.d), (planes.m, form.m)):
        if plane is not None and at is not None:
            raw = plane[start:stop].contiguous().view(torch.uint8).view(blocks.shape[0], -1)
            blocks[:, at : at + raw.shape[1]] = raw


def unpack(planes: Planes) -> QuantTensor:
    """The file's bytes again, bit for bit. Only for what `pack` did not decode."""
    if planes.type in DENSE:
        return QuantTensor(planes.low.view(*planes.shape).view(torch.uint8), planes.type, planes.shape)
    assert planes.type in FORMS, f"{planes.type.name} was decoded when it was packed"
    info, columns = TYPES[planes.type], planes.shape[-1]
    data = torch.empty(planes.rows, columns // info.block_size, info.type_size, dtype=torch.uint8, device=planes.low.device)
    _in_chunks(
        planes.rows,
        columns,
        lambda start, stop: _unpack_rows(planes, start, stop, data[start:stop].view(-1, info.type_size)),
    )
    return QuantTensor(data.view(*planes.shape[:-1], -1), planes.type, planes.shape)
