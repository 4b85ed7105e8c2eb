"""Floating-point text as Go's strconv writes it."""

from __future__ import annotations

import math
import re
from decimal import Decimal


def shortest(value: float, style: str) -> str:
    """The shortest digits that read back as `value`, in style "e", "f" or "g" (exponent from 1e6 on and below 1e-4)."""
    if math.isinf(value) or math.isnan(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent) if value else 1  # the decimal point stands after this many digits
    minus = "-" if sign else ""
    if style == "e" or (style == "g" and (point - 1 < -4 or point - 1 >= 6)):
        fraction = f".{text[1:]}" if len(text) > 1 else ""
        return f"{minus}{text[0]}{fraction}e{'+' if point > 0 else '-'}{abs(point - 1):02d}"
    if point <= 0:
        return f"{minus}0.{'0' * -point}{text}"
    padded = text.ljust(point, "0")
    fraction = f".{padded[point:]}" if len(padded) > point else ""
    return f"{minus}{padded[:point]}{fraction}"


def fixed(value: float, verb: str, precision: int) -> str:
    """`value` with a precision, for the verbs e E f F g G."""
    if math.isinf(value) or math.isnan(value):
        return shortest(value, "g")
    text = f"{value:.{precision}{verb}}"
    return re.sub(r"([eE][+-])(\d)$", r"\g<1>0\2", text)
