"""Text of values as Go's fmt package makes it: Sprint, Sprintln, Sprintf (https://pkg.go.dev/fmt).

A template cannot ask for much more text than it holds values: widths and precisions are bounded as in Go (10^6).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ollamapy.chat.gotemplate.floats import fixed, shortest
from ollamapy.chat.gotemplate.json import dumps
from ollamapy.chat.gotemplate.values import JSONList, JSONMap, NilMap, StringOrList, Struct, kind, to_bytes, type_name

MAX_WIDTH = 1_000_000
_VERB = re.compile(r"%([-+# 0]*)(\*|\d+)?(?:(\.)(\*|\d*))?(.?)", re.DOTALL)


@dataclass(slots=True)
class Spec:
    """One verb with its flags; `precision` None means not given."""

    verb: str
    flags: str
    width: int | None
    precision: int | None


def stringer(value: Any) -> str | None:
    """The text of values that have a String method."""
    if isinstance(value, NilMap):
        return "{}"
    if isinstance(value, (JSONMap, JSONList)) or (isinstance(value, Struct) and value.prints_json):
        return dumps(value)
    if isinstance(value, StringOrList) and len(value) <= 1:
        return "".join(value)
    return None


def plain(value: Any, named: bool = False) -> str:
    """`%v`, or `%+v` with field names."""
    if isinstance(value, str):
        return value
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return shortest(value, "g")
    text = stringer(value)
    if text is not None:
        return text
    return _compound(value, lambda item: plain(item, named), named)


def _compound(value: Any, one: Callable[[Any], str], named: bool = False) -> str:
    """Slices, maps (sorted) and structs, with `one` for each element; anything else as Python prints it."""
    if isinstance(value, list):
        return "[" + " ".join([one(item) for item in value]) + "]"
    if isinstance(value, dict):
        return "map[" + " ".join([f"{one(key)}:{one(value[key])}" for key in sorted(value)]) + "]"
    if isinstance(value, Struct):
        return "{" + " ".join([f"{name}:{one(item)}" if named else one(item) for name, item in value.values.items()]) + "}"
    return str(value)


def sprint(values: Sequence[Any]) -> str:
    """Operands joined, with a space between two neighbours when neither is a string."""
    pieces: list[str] = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            pieces.append(" ")
        pieces.append(plain(value))
    return "".join(pieces)


def sprintln(values: Sequence[Any]) -> str:
    return " ".join([plain(value) for value in values]) + "\n"


def sprintf(template: str, values: Sequence[Any], charge: Callable[[int], None]) -> str:
    """Formats; what does not fit is marked as Go marks it. `charge` is told the length of each piece as it is made."""
    pieces: list[str] = []
    taken = position = 0

    def star() -> int | None:
        nonlocal taken
        taken += 1
        value = values[taken - 1] if taken <= len(values) else None
        good = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_WIDTH
        return value if good else None

    for match in _VERB.finditer(template):
        flags, width, dot, precision, verb = match.groups()
        pieces.append(template[position : match.start()])
        position = match.end()
        if verb == "%":
            pieces.append("%")
            continue
        spec = Spec(verb, flags, None, None)
        if width is not None:
            spec.width = star() if width == "*" else int(width[:8])
            pieces += ["%!(BADWIDTH)"] if spec.width is None or spec.width > MAX_WIDTH else []
            spec.width = None if spec.width is None or spec.width > MAX_WIDTH else spec.width
        if dot:
            spec.precision = star() if precision == "*" else int(precision[:8] or 0)
            bad = spec.precision is None or not 0 <= spec.precision <= MAX_WIDTH
            pieces += ["%!(BADPREC)"] if bad else []
            spec.precision = None if bad else spec.precision
        if not verb:
            pieces.append("%!(NOVERB)")
        elif taken >= len(values):
            pieces.append(f"%!{verb}(MISSING)")
        else:
            charge(spec.width or 0)
            pieces.append(_formatted(spec, values[taken]))
            taken += 1
        charge(len(pieces[-1]))
    pieces.append(template[position:])
    if taken < len(values):
        extra = ", ".join(f"{type_name(value)}={plain(value)}" if value is not None else "<nil>" for value in values[taken:])
        pieces.append(f"%!(EXTRA {extra})")
    return "".join(pieces)


def _formatted(spec: Spec, value: Any) -> str:
    if spec.verb == "T":
        return _pad(spec, type_name(value) if value is not None else "<nil>")
    if spec.verb == "v" and "#" not in spec.flags:
        named = "+" in spec.flags
        if isinstance(value, (str, list, dict, Struct)) or value is None:
            text = plain(value, named)
            return _pad(spec, text[: spec.precision] if isinstance(value, str) and spec.precision is not None else text)
    own = stringer(value) if spec.verb in "sqxXv" else None
    if own is not None:
        value = own
    if isinstance(value, (list, dict, Struct)):
        return _compound(value, lambda item: "<nil>" if item is None else _formatted(spec, item))
    handler = _BY_KIND.get(kind(value))
    made = handler(spec, value) if handler else None
    if made is None:
        shown = "<nil>" if value is None else f"{type_name(value)}={_formatted(replace(spec, verb='v'), value)}"
        return f"%!{spec.verb}({shown})"
    return made


def _pad(spec: Spec, text: str, number: bool = False) -> str:
    """To the width, in runes; zeros go between a number's sign and its digits."""
    width = spec.width or 0
    if "-" in spec.flags or width < 0:
        return text.ljust(abs(width))
    if "0" in spec.flags and number:
        sign = text[:1] if text[:1] in ("+", "-", " ") else ""
        return sign + text[len(sign) :].rjust(width - len(sign), "0")
    return text.rjust(width, "0" if "0" in spec.flags else " ")


def _string(spec: Spec, value: str) -> str | None:
    text = value if spec.precision is None else value[: spec.precision]
    if spec.verb in "sv":
        return _pad(spec, quoted(text) if spec.verb == "v" else text)
    if spec.verb == "q":
        raw = "#" in spec.flags and "`" not in text and text.isprintable()
        return _pad(spec, f"`{text}`" if raw else quoted(text, "+" in spec.flags))
    if spec.verb in "xX":
        data = to_bytes(value)[: spec.precision]
        text = data.hex(" ") if " " in spec.flags else data.hex()
        return _pad(spec, text.upper() if spec.verb == "X" else text)
    return None


def quoted(text: str, ascii_only: bool = False) -> str:
    """A Go string literal: %q, or %+q."""
    named = {
        "\a": "\\a",
        "\b": "\\b",
        "\f": "\\f",
        "\n": "\\n",
        "\r": "\\r",
        "\t": "\\t",
        "\v": "\\v",
        '"': '\\"',
        "\\": "\\\\",
    }
    pieces = []
    for character in text:
        point = ord(character)
        if character in named:
            pieces.append(named[character])
        elif character.isprintable() and (point < 0x80 or not ascii_only):
            pieces.append(character)
        elif 0xDC80 <= point <= 0xDCFF:  # a byte that is no UTF-8
            pieces.append(f"\\x{point - 0xDC00:02x}")
        else:
            pieces.append(f"\\x{point:02x}" if point < 0x80 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}")
    return '"' + "".join(pieces) + '"'


def _signed(spec: Spec, text: str) -> str:
    if not text.startswith("-"):
        text = ("+" if "+" in spec.flags else " " if " " in spec.flags else "") + text
    return text


def _integer(spec: Spec, value: int) -> str | None:
    formats = {"d": "d", "v": "d", "x": "x", "X": "X", "o": "o", "b": "b"}
    if spec.verb in formats:
        text = format(abs(value), formats[spec.verb])
        if spec.precision is not None:
            text = "" if spec.precision == 0 and value == 0 else text.rjust(spec.precision, "0")
        prefix = {"x": "0x", "X": "0X", "o": "0", "b": "0b"}.get(spec.verb, "") if "#" in spec.flags else ""
        return _pad(spec, _signed(spec, ("-" if value < 0 else "") + prefix + text), spec.precision is None)
    if spec.verb == "c":
        return _pad(spec, chr(value) if 0 <= value < 0x110000 else "\ufffd")
    if spec.verb == "q":
        return _pad(spec, "'" + quoted(chr(value) if 0 <= value < 0x110000 else "\ufffd")[1:-1].replace('\\"', '"') + "'")
    if spec.verb == "U":
        return _pad(spec, f"U+{value:04X}")
    return None


def _real(spec: Spec, value: float) -> str | None:
    if spec.verb in "gGv" and spec.precision is None:
        text = shortest(value, "g")
    elif spec.verb in "eEfFgGv":
        verb = "g" if spec.verb == "v" else spec.verb
        text = fixed(value, verb, 6 if spec.precision is None else spec.precision)
    else:
        return None
    return _pad(spec, _signed(spec, text.upper() if spec.verb in "EG" else text), True)


def _boolean(spec: Spec, value: bool) -> str | None:
    return _pad(spec, "true" if value else "false") if spec.verb in "tv" else None


_BY_KIND: dict[str, Callable[[Spec, Any], str | None]] = {
    "string": _string,
    "int": _integer,
    "float": _real,
    "bool": _boolean,
}
