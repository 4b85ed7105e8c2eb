"""From planes (see `layout`) to values in registers: what every kernel that reads weights calls. No launcher here.

Everything that differs between quantization types is a constexpr: LOW and HIGH bits, OFFSET, SCALE (a `layout.Scale`),
SCALE_OFFSET, MIN (a `Min`), TWO (the halves of a group have scales of their own), T0 to T3 (a table of 16 int8, or zeros).
Groups come as `row` (R, 1) int64 and `group` (1, G), halves of a group as (R, G, 16).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ollamapy.triton_kernels.forms import Form, Scale
from ollamapy.triton_kernels.layout import Planes

NO_MIN, ADDED_MIN, SCALED_MIN = 0, 1, 2  # none; + m; - m times a sub-min (K-quants)


def constants(form: Form) -> dict[str, int]:
    """The constexpr parameters of a type."""
    scaled = form.scale in (Scale.PAIRS, Scale.NIBBLES)
    return {
        "LOW": form.low.bits,
        "HIGH": form.high.bits if form.high else 0,
        "OFFSET": form.offset,
        "SCALE": int(form.scale),
        "SCALE_OFFSET": form.scale_offset,
        "MIN": NO_MIN if form.m is None else SCALED_MIN if scaled else ADDED_MIN,
        "TWO": int(form.two_scales),
        **{f"T{i}": word for i, word in enumerate(form.table)},
    }


def pointers(planes: Planes) -> dict[str, object]:
    """The tensor parameters of a type; a plane that it does not have is never read, `low` stands in for it."""
    absent = planes.low
    return {
        "low": planes.low,
        "high": absent if planes.high is None else planes.high,
        "scales": absent if planes.scales is None else planes.scales,
        "d": absent if planes.d is None else planes.d,
        "m": absent if planes.m is None else planes.m,
    }


@triton.jit
def _look_up(code, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """Entry `code` of 16 int8 in four words: selects and shifts, no memory."""
    word = tl.where(code < 8, tl.where(code < 4, T0, T1), tl.where(code < 12, T2, T3)).to(tl.int32)
    return (word << (24 - 8 * (code & 3))) >> 24


@triton.jit
def _value(code, OFFSET: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    if T1 != 0:  # the second word of a table is never zero
        return _look_up(code, T0, T1, T2, T3)
    else:
        return code - OFFSET


@triton.jit
def codes(
    low,
    high,
    at,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """Unscaled values of the groups `at` (R, G): weights 0 to 15 and 16 to 31, two (R, G, 16) int32 within an int8's range."""
    j = tl.arange(0, 16)[None, None, :]
    if LOW == 8:
        whole = low + at[:, :, None] * 32 + j
        first = tl.load(whole).to(tl.int8, bitcast=True).to(tl.int32)
        second = tl.load(whole + 16).to(tl.int8, bitcast=True).to(tl.int32)
    elif LOW == 4:
        both = tl.load(low + at[:, :, None] * 16 + j).to(tl.int32)
        first = both & 15
        second = both >> 4
    elif LOW == 1:
        bits = tl.load(low + at)[:, :, None]
        first = (bits >> j) & 1
        second = (bits >> (j + 16)) & 1
    else:
        first = (tl.load(low + at * 2)[:, :, None] >> (2 * j)) & 3
        second = (tl.load(low + at * 2 + 1)[:, :, None] >> (2 * j)) & 3
    if HIGH == 1:
        bits = tl.load(high + at)[:, :, None]
        first |= ((bits >> j) & 1) << LOW
        second |= ((bits >> (j + 16)) & 1) << LOW
    elif HIGH == 2:
        first |= ((tl.load(high + at * 2)[:, :, None] >> (2 * j)) & 3) << LOW
        second |= ((tl.load(high + at * 2 + 1)[:, :, None] >> (2 * j)) & 3) << LOW
    return _value(first, OFFSET, T0, T1, T2, T3), _value(second, OFFSET, T0, T1, T2, T3)


@triton.jit
def halves(
    low,
    high,
    at,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """`codes` as float32."""
    first, second = codes(low, high, at, LOW, HIGH, OFFSET, T0, T1, T2, T3)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _six_bits(scales, row, group, groups, SCALE: tl.constexpr):
    """Low nibbles and high 2 bits of the 6-bit numbers of a group: the byte and the rest, not yet told apart."""
    if SCALE == 2:
        base = row * (groups + groups // 2)
        low = tl.load(scales + base + group).to(tl.int32)
        high = tl.load(scales + base + groups + group // 2).to(tl.int32) >> (4 * (group & 1))
    else:
        base = row * (groups // 2 + groups // 4)
        low = tl.load(scales + base + group // 2).to(tl.int32) >> (4 * (group & 1))
        high = tl.load(scales + base + groups // 2 + group // 4).to(tl.int32) >> (2 * (group & 3))
    return low, high


@triton.jit
def _ue4m3(scales, at):
    """The scale bytes `at`, halved: as float16 their bits are 256 times smaller. 127 means zero; the sign is not looked at."""
    byte = tl.load(scales + at).to(tl.int16)
    bits = tl.where(byte == 127, 0, (byte & 127) << 7).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 128.0


@triton.jit
def group_scales(scales, d, m, row, group, groups, SCALE: tl.constexpr, SCALE_OFFSET: tl.constexpr, MIN: tl.constexpr):
    """Scales of both halves and what is added to both (the min of each half), four (R, G) float32."""
    at = row * groups + group
    zero = (row * 0 + group * 0).to(tl.float32)
    if SCALE <= 1:
        if SCALE == 0:
            first = tl.load(d + at).to(tl.float32)
        else:
            byte = tl.load(d + at).to(tl.int32)  # 2^(byte - 128); bytes 0 and 1 are subnormal in float32
            bits = tl.where(byte < 2, (1 << 21) << byte, (byte - 1) << 23)
            first = bits.to(tl.float32, bitcast=True)
        second = first
    elif SCALE == 6:
        first = _ue4m3(scales, at * 2)
        second = _ue4m3(scales, at * 2 + 1)
    elif SCALE > 6:
        first = tl.load(d + (at >> (SCALE - 6))).to(tl.float32)
        second = first
    else:
        step = tl.load(d + row * (groups // 8) + group // 8).to(tl.float32)
        if SCALE == 2:
            low, high = _six_bits(scales, row, group, groups, SCALE)
            pair0 = ((low & 15) | ((high & 3) << 4)) - SCALE_OFFSET
            pair1 = ((low >> 4) | (((high >> 2) & 3) << 4)) - SCALE_OFFSET
            first = step * pair0.to(tl.float32)
            second = first if MIN == 2 else step * pair1.to(tl.float32)
        elif SCALE == 5:
            low, high = _six_bits(scales, row, group, groups, SCALE)
            first = step * (((low & 15) | ((high & 3) << 4)) - SCALE_OFFSET).to(tl.float32)
            second = first
        else:
            byte0 = tl.load(scales + at * 2).to(tl.int32)
            byte1 = tl.load(scales + at * 2 + 1).to(tl.int32)
            if SCALE == 3:
                first = step * byte0.to(tl.int8).to(tl.float32)
                second = step * byte1.to(tl.int8).to(tl.float32)
            else:
                first = step * (byte0 & 15).to(tl.float32)
                second = step * (byte1 & 15).to(tl.float32)
    if MIN == 0:
        return first, second, zero, zero
    elif MIN == 1:
        added = tl.load(m + at).to(tl.float32)
        return first, second, added, added
    else:
        step_of_mins = tl.load(m + row * (groups // 8) + group // 8).to(tl.float32)
        if SCALE == 2:
            taken = -(step_of_mins * pair1.to(tl.float32))
            return first, second, taken, taken
        else:
            return first, second, -(step_of_mins * (byte0 >> 4).to(tl.float32)), -(step_of_mins * (byte1 >> 4).to(tl.float32))


@triton.jit
def weights(
    low,
    high,
    scales,
    d,
    m,
    row,
    group,
    groups,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    MIN: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
):
    """Dequantized halves of groups, two (R, G, 16) float32, in the order of operations of the decoders in `quant`."""
    first, second = halves(low, high, row * groups + group, LOW, HIGH, OFFSET, T0, T1, T2, T3)
    scale0, scale1, min0, min1 = group_scales(scales, d, m, row, group, groups, SCALE, SCALE_OFFSET, MIN)
    first *= scale0[:, :, None]
    second *= scale1[:, :, None]
    if MIN != 0:
        first += min0[:, :, None]
        second += min1[:, :, None]
    return first, second
