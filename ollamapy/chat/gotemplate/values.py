"""What Go values are to the template language: their truth, kind, type names, and structs. No text is made here.

Python values stand for Go's: str, bool, int, float, None (nil), list (slice), dict (map). Strings count bytes, as in Go.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

_SURROGATE = re.compile("[\ud800-\udfff]")


class Struct:
    """A value with named fields; asking for another field is an error. Subclasses declare `fields`.

    `fields` maps a field's name to its name in JSON and whether it is left out of JSON when empty.
    """

    fields: ClassVar[dict[str, tuple[str, bool]]] = {}
    type_name: ClassVar[str] = "struct"
    prints_json: ClassVar[bool] = False

    def __init__(self, **values: Any) -> None:
        self.values = {name: values.get(name) for name in self.fields}


class JSONMap(dict[str, Any]):
    """A map that prints as JSON."""


class OrderedMap(dict[str, Any]):
    """A map whose JSON keeps the order of its keys."""


class JSONList(list[Any]):
    """A slice that prints as JSON."""


class StringOrList(list[str]):
    """A slice of strings that prints and marshals as a plain string when it has one element."""


class NilList(list[Any]):
    """A nil slice: null in JSON."""


class NilMap(dict[str, Any]):
    """A nil map: null in JSON, {} where it prints as JSON."""


def truth(value: Any) -> bool:
    """Whether Go's `if` takes the branch: empty, zero and nil are false, a struct is always true."""
    return isinstance(value, Struct) or bool(value)


def kind(value: Any) -> str:
    """The comparison class of a value: bool, int, float, string, nil or other."""
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    return "string" if isinstance(value, str) else "other"


def type_name(value: Any) -> str:
    """Go's name of the value's type, for messages and %T."""
    if isinstance(value, Struct):
        return value.type_name
    if isinstance(value, dict):
        return "map[string]interface {}"
    if isinstance(value, list):
        return "[]interface {}"
    return {"nil": "nil", "float": "float64"}.get(kind(value), kind(value))


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def from_bytes(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def clean(text: str) -> str:
    """`text` with bytes that are no UTF-8 (lone surrogates inside the interpreter) replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half of a surrogate pair, which came in with the data
        return _SURROGATE.sub("\ufffd", text)
