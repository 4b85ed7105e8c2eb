"""Go's string, rune and number literals to Python values (https://go.dev/ref/spec#Lexical_elements)."""

from __future__ import annotations

import math
import re

from ollamapy.chat.gotemplate.lexer import failure

_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"'}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_MAX_INT = 2**63 - 1


def unquote(text: str, line: int) -> str:
    """The value of a quoted or raw string. Escaped bytes that are no UTF-8 become lone surrogates until output."""
    if text[0] == "`":
        return text[1:-1].replace("\r", "")
    if "\\" not in text:
        return text[1:-1]
    pieces: list[bytes] = []
    position, body = 0, text[1:-1]
    for match in _ESCAPE.finditer(body):
        pieces += [body[position : match.start()].encode(), _escape(match.group(1), text, line)]
        position = match.end()
    pieces.append(body[position:].encode())
    return b"".join(pieces).decode("utf-8", "surrogateescape")


def _escape(code: str, text: str, line: int) -> bytes:
    if code in _SIMPLE and not (code == "'" and text[0] == '"') and not (code == '"' and text[0] == "'"):
        return _SIMPLE[code].encode()
    if len(code) > 1 and code[0] in "uU" and (point := int(code[1:], 16)) <= 0x10FFFF and not 0xD800 <= point < 0xE000:
        return chr(point).encode()
    if len(code) == 3:
        value = int(code[1:], 16) if code[0] == "x" else int(code, 8)
        if value < 256:
            return bytes((value,))
    raise failure(line, f"invalid syntax in {text}")


def unquote_char(text: str, line: int) -> int:
    """The code point of a rune literal."""
    body = text[1:-1]
    if body.startswith("\\x") or re.fullmatch(r"\\[0-7]{3}", body):
        return _escape(body[1:], text, line)[0]
    value = unquote(text, line)
    if len(value) != 1:
        raise failure(line, f"malformed character constant: {text}")
    return ord(value)


def number(text: str, line: int) -> int | float:
    """An untyped constant: int where it has no fraction and fits, else float."""
    digits = text.replace("_", "")
    try:
        value: int | float = int(digits, 8 if re.fullmatch(r"[+-]?0[0-7]+", digits) else 0)
    except ValueError:
        value = _float(digits, text, line)
    if isinstance(value, int) and not -_MAX_INT - 1 <= value <= _MAX_INT:
        raise failure(line, f"integer overflow: {text}")
    return value


def _float(digits: str, text: str, line: int) -> float:
    try:
        value = float(digits)
    except ValueError:
        raise failure(line, f"illegal number syntax: {text!r}") from None
    if math.isinf(value) or not set(digits) & set(".eE"):
        raise failure(line, f"illegal number syntax: {text!r}")
    return value
