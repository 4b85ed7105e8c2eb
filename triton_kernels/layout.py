"""The packed weight layout of the GPU kernels: a tensor's bits as aligned planes, in plain torch. Knows no kernel.

A GGUF block mixes codes, scales and steps in 17 to 210 bytes, so its fields start at odd addresses. Here every field of a
tensor is a plane of its own: codes (low bits and high bits apart), group scales, steps. Packing permutes bits and adds none:
`unpack` gives the file's bytes back, and planes are as large as the tensor was. But for the types whose codes are places in a
grid, or digits of base three (`quant.forms.RECODED`): these are written anew first, with the same values and 2 to 4 bits each.

The unit is a group of 32 consecutive weights of a row, seen as two halves of 16. Planes per group:
- low, 4 bits: 16 bytes, byte j holds weight j in its low and weight j + 16 in its high nibble
- low, 8 bits: 32 bytes; low or high, 2 bits: two int32, weight j of each half at bits 2j
- low or high, 1 bit: one int32, weight j at bit j
- scales: see `Scale`; a row's second kind of scale byte follows all of the first kind
- d and m: float16 (float32 of what was written anew, or the E8M0 byte), one per block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.bits import fields, join_fields
from ollamapy.quant.coded import recoded
from ollamapy.quant.forms import RECODED
from ollamapy.quant.tensor import QuantTensor
from ollamapy.triton_kernels.forms import FORMS, GROUP, Field, Form, Scale

CHUNK_WEIGHTS = 1 << 25  # packed at a time: codes are one byte each on the way, 32 MiB
DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


@dataclass(slots=True, eq=False)
class Planes:
    """A weight (..., N, K) as planes (R, ...), R being the rows of all leading dimensions. Dense weights: `low` alone."""

    type: GGMLType  # as the file has it
    shape: tuple[int, ...]
    low: Tensor  # uint8, or int32 (1- and 2-bit codes), or the dense values (R, K)
    high: Tensor | None = None  # int32
    scales: Tensor | None = None  # uint8
    d: Tensor | None = None  # float16, float32, or uint8 (E8M0)
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


def _plane_width(bits: int) -> int:
    return GROUP // 2 if bits == 4 else 1


def _to_pairs(packed: Tensor, of_mins: bool) -> Tensor:
    """12 bytes of a block -> eight pairs (n, 8, 2) of 6 bits: (scale, min) of Q4_K and Q5_K, or two scales of Q3_K."""
    if of_mins:
        scale, minimum, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
        scales = torch.cat([scale & 63, (both & 15) | (scale >> 2 & 48)], dim=1)
        return torch.stack([scales, torch.cat([minimum & 63, (both >> 4) | (minimum >> 2 & 48)], dim=1)], dim=2)
    low = fields(packed[:, :8].contiguous(), 4, 8)
    high = fields(packed[:, 8:].contiguous(), 2, 4)
    return (low | high << 4).view(-1, 8, 2)


def _from_pairs(pairs: Tensor, of_mins: bool) -> Tensor:
    """The inverse of `_to_pairs`."""
    if of_mins:
        scales, minima = pairs[..., 0], pairs[..., 1]
        tops = [first[:, :4] | (first[:, 4:] >> 4 << 6) for first in (scales, minima)]
        return torch.cat([*tops, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], dim=1)
    flat = pairs.reshape(-1, 16)
    return torch.cat([join_fields(flat & 15, 4, 8), join_fields(flat >> 4, 2, 4)], dim=1)


def _pack_scales(packed: Tensor, form: Form, rows: int) -> Tensor:
    """A block's scale bytes (blocks, S) -> (rows, bytes)."""
    if form.scale is Scale.PAIRS:
        pairs = _to_pairs(packed, form.m is not None)
        low = (pairs[..., 0] & 15) | (pairs[..., 1] & 15) << 4
        high = (pairs[..., 0] >> 4) | (pairs[..., 1] >> 4) << 2
        return torch.cat([low.reshape(rows, -1), join_fields(high.reshape(rows, -1), 4, 1)], dim=1)
    if form.scale is Scale.SIXES:
        return torch.cat([packed[:, 2:].reshape(rows, -1), packed[:, :2].reshape(rows, -1)], dim=1)
    return packed.reshape(rows, -1)


def _unpack_scales(plane: Tensor, form: Form, blocks: int) -> Tensor:
    """The inverse: (rows, bytes) -> (blocks of all rows, S)."""
    if form.scale is Scale.PAIRS:
        split = plane.shape[1] // 3 * 2
        low = plane[:, :split].reshape(blocks, 8)
        high = fields(plane[:, split:].contiguous(), 4, 1).view(blocks, 8)
        first, second = (low & 15) | (high & 3) << 4, (low >> 4) | (high >> 2) << 4
        return _from_pairs(torch.stack([first, second], dim=2), form.m is not None)
    if form.scale is Scale.SIXES:
        split = plane.shape[1] // 3 * 2
        return torch.cat([plane[:, split:].reshape(blocks, 2), plane[:, :split].reshape(blocks, 4)], dim=1)
    return plane.reshape(blocks, -1)


def _codes(blocks: Tensor, field: Field) -> Tensor:
    """One byte each, in the order of the weights."""
    return fields(blocks[:, field.start : field.stop].contiguous(), field.bits, field.width)


def _steps(blocks: Tensor, at: int, rows: int, dtype: torch.dtype) -> Tensor:
    return blocks[:, at : at + dtype.itemsize].contiguous().view(dtype).view(rows, -1)


def _pack_rows(data: Tensor, type: GGMLType, columns: int) -> Planes:
    form, rows = FORMS[type], data.shape[0]
    blocks = data.reshape(-1, TYPES[type].type_size)
    if type in RECODED:
        blocks = recoded(blocks, type)

    def plane(codes: Tensor, bits: int) -> Tensor:
        packed = join_fields(codes.view(rows, columns), bits, _plane_width(bits)).contiguous()
        return packed if bits >= 4 else packed.view(torch.int32)

    low, high = form.low, form.high
    first, last = form.scales
    return Planes(
        type,
        (rows, columns),
        low=plane(_codes(blocks, low), low.bits),
        high=plane(_codes(blocks, high), high.bits) if high else None,
        scales=_pack_scales(blocks[:, first:last], form, rows).contiguous() if last else None,
        d=None if form.d is None else _steps(blocks, form.d, rows, form.step),
        m=None if form.m is None else _steps(blocks, form.m, rows, torch.float16),
    )


def _in_chunks(rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    step = max(CHUNK_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        work(start, min(start + step, rows))


def pack(weight: QuantTensor) -> Planes:
    """The planes of a tensor, on its device. Float types are dense: as they are, F64 as bfloat16."""
    columns = weight.shape[-1]
    data = weight.data.reshape(-1, weight.data.shape[-1])
    if weight.type not in FORMS:
        dtype = DENSE.get(weight.type)
        dense = weight.dequantize(torch.bfloat16) if dtype is None else weight.data.contiguous().clone().view(dtype)
        return Planes(weight.type, weight.shape, dense.view(-1, columns))
    planes: dict[str, Tensor] = {}  # of all rows: beside them and the file's bytes only one chunk is held

    def work(start: int, stop: int) -> None:
        for name, plane in _pack_rows(data[start:stop], weight.type, columns).tensors.items():
            if name not in planes:
                planes[name] = plane.new_empty(data.shape[0], *plane.shape[1:])
            planes[name][start:stop] = plane

    _in_chunks(data.shape[0], columns, work)
    return Planes(weight.type, weight.shape, **planes)


def prepare(weight: QuantTensor, device: torch.device) -> Planes:
    """Packed on the device, a chunk of rows at a time: for Triton's `embedding`, and CUDA's `linear`."""
    return pack(weight.to(device))


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
        codes = fields(raw, field.bits, _plane_width(field.bits)).view(-1, per_block)
        blocks[:, field.start : field.stop] = join_fields(codes, field.bits, field.width)

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
    """The file's bytes again, bit for bit. Only for what `pack` did not write anew."""
    if planes.type in DENSE:
        return QuantTensor(planes.low.view(*planes.shape).view(torch.uint8), planes.type, planes.shape)
    assert planes.type in FORMS and planes.type not in RECODED, f"{planes.type.name} has other bits than the file"
    info, columns = TYPES[planes.type], planes.shape[-1]
    data = torch.empty(planes.rows, columns // info.block_size, info.type_size, dtype=torch.uint8, device=planes.low.device)
    _in_chunks(
        planes.rows,
        columns,
        lambda start, stop: _unpack_rows(planes, start, stop, data[start:stop].view(-1, info.type_size)),
    )
    return QuantTensor(data.view(*planes.shape[:-1], -1), planes.type, planes.shape)
