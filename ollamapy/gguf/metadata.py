"""The key-value part of a GGUF header: checked reading of its bytes, and a mapping that decodes arrays when asked.

Knows no key's meaning. Every count and length is compared with the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ollamapy.errors import GGUFError
from ollamapy.gguf.types import SCALAR_FORMATS, GGUFValue, ValueType

MAX_KEYS = 1 << 16
MAX_NAME_BYTES = (1 << 16) - 1  # the specification's limit for keys; tensors' names get the same
MAX_ARRAY_LENGTH = 1 << 24
MAX_VARIABLE_ELEMENTS = 1 << 23  # strings and nested arrays in one file: each costs a Python step, 80 ns
MAX_ARRAY_DEPTH = 4

_LENGTH = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")
_SCALARS = {type: struct.Struct("<" + letter) for type, letter in SCALAR_FORMATS.items()}


class ArraySpan(NamedTuple):
    """Where an array's elements lie: `length` of `type` from byte `offset`."""

    type: ValueType
    length: int
    offset: int


class Cursor:
    """Reads a header front to back. Every failure is a GGUFError with the file, the field and the offset."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self.view, self.offset = path, view, 0
        self._variable_elements = 0

    def error(self, field: str, problem: str, offset: int | None = None) -> GGUFError:
        return GGUFError(self.path, field, self.offset if offset is None else offset, problem)

    def need(self, field: str, nbytes: int) -> None:
        left = len(self.view) - self.offset
        if nbytes > left:
            raise self.error(field, f"needs {nbytes} bytes, the file has {left} left")

    def unpack(self, field: str, layout: struct.Struct) -> Any:
        self.need(field, layout.size)
        values = layout.unpack_from(self.view, self.offset)
        self.offset += layout.size
        return values if len(values) > 1 else values[0]

    def count(self, field: str, limit: int, least_bytes: int) -> int:
        """A 64-bit count of things that take `least_bytes` each; refused above `limit` or above what the file can hold."""
        start = self.offset
        count: int = self.unpack(field, _LENGTH)
        left = len(self.view) - self.offset
        if count > limit or count * least_bytes > left:
            raise self.error(field, f"{count} is more than the {left} bytes left can hold, or than the limit {limit}", start)
        return count

    def string(self, field: str, limit: int | None = None) -> str:
        start = self.offset
        length: int = self.unpack(field, _LENGTH)
        left = len(self.view) - self.offset
        if length > left:
            raise self.error(field, f"string of {length} bytes, the file has {left} left", start)
        if limit is not None and length > limit:
            raise self.error(field, f"string of {length} bytes, the limit is {limit}", start)
        raw = bytes(self.view[self.offset : self.offset + length])
        self.offset += length
        try:
            return raw.decode()
        except UnicodeDecodeError as problem:
            raise self.error(field, f"not UTF-8: {problem.reason}", start) from None

    def value_type(self, field: str) -> ValueType:
        start = self.offset
        number = self.unpack(field, _SCALARS[ValueType.UINT32])
        if number not in ValueType._value2member_map_:
            raise self.error(field, f"unknown metadata type {number}", start)
        return ValueType(number)

    def scalar(self, field: str, type: ValueType) -> Any:
        start = self.offset
        value = self.unpack(field, _SCALARS[type])
        if type is not ValueType.BOOL:
            return value
        if value > 1:
            raise self.error(field, f"{value} is not a boolean", start)
        return bool(value)

    def skip_array(self, field: str, depth: int = 1) -> ArraySpan:
        """Passes over an array without decoding it."""
        start = self.offset
        type = self.value_type(field)
        size = _SCALARS[type].size if type in _SCALARS else _ARRAY_HEAD.size if type is ValueType.ARRAY else _LENGTH.size
        count = self.count(field, MAX_ARRAY_LENGTH, size)
        span = ArraySpan(type, count, self.offset)
        if type in _SCALARS:
            self.offset += count * size
            return span
        self._variable_elements += count
        if self._variable_elements > MAX_VARIABLE_ELEMENTS:
            raise self.error(field, f"more than {MAX_VARIABLE_ELEMENTS} strings and nested arrays in one file", start)
        if type is ValueType.STRING:
            self._skip_strings(field, count)
            return span
        if depth == MAX_ARRAY_DEPTH:
            raise self.error(field, f"arrays nested deeper than {MAX_ARRAY_DEPTH}", start)
        for _ in range(count):
            self.skip_array(field, depth + 1)
        return span

    def _skip_strings(self, field: str, count: int) -> None:
        # The whole cost of opening a file with a large vocabulary: 20 ms for 262,144 strings. Bounds are left to
        # `unpack_from`, which refuses offsets past the end; Python integers do not wrap.
        offset, view, unpack = self.offset, self.view, _LENGTH.unpack_from
        index = 0
        try:
            for index in range(count):  # noqa: B007
                offset += 8 + unpack(view, offset)[0]
        except (struct.error, OverflowError):
            index -= 1  # the string before claimed to reach this far
        if offset > len(view):
            raise self.error(f"{field}[{max(index, 0)}]", "string runs past the end of the file")
        self.offset = offset


class Metadata(Mapping[str, Any]):
    """Keys and values as they stand in the file, in its order. Arrays become lists when they are first asked for.

    Holds the file's mapping open until it is dropped itself.
    """

    def __init__(self, path: Path, view: memoryview) -> None:
        self._path, self._view = path, view
        self._types: dict[str, ValueType] = {}
        self._values: dict[str, Any] = {}
        self._arrays: dict[str, ArraySpan] = {}

    @classmethod
    def scan(cls, cursor: Cursor, count: int) -> Metadata:
        self = cls(cursor.path, cursor.view)
        for index in range(count):
            start = cursor.offset
            key = cursor.string(f"key {index}", MAX_NAME_BYTES)
            if not key:
                raise cursor.error(f"key {index}", "empty key", start)
            if key in self._types:
                raise cursor.error(key, "duplicate key", start)
            type = self._types[key] = cursor.value_type(key)
            if type is ValueType.ARRAY:
                self._arrays[key] = cursor.skip_array(key)
            elif type is ValueType.STRING:
                self._values[key] = cursor.string(key)
            else:
                self._values[key] = cursor.scalar(key, type)
        return self

    def __getitem__(self, key: str) -> Any:
        if key not in self._values and key in self._arrays:
            span = self._arrays[key]
            self._values[key] = self._elements(key, span)[0]
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def __contains__(self, key: object) -> bool:
        return key in self._types

    def array_length(self, key: str) -> int | None:
        """Number of elements of an array, without decoding it; None when the key is absent or no array."""
        return self._arrays[key].length if key in self._arrays else None

    def typed(self, key: str) -> GGUFValue:
        """The value with its type in the file, as the writer takes it."""
        if key not in self._arrays:
            return GGUFValue(self._types[key], self[key])
        span = self._arrays[key]
        while span.type is ValueType.ARRAY and span.length:
            span = self._nested(span.offset)
        return GGUFValue(span.type, self[key])

    def _elements(self, key: str, span: ArraySpan) -> tuple[list[Any], int]:
        """Decoded elements and the offset behind them. The scan has checked all bounds."""
        if span.type is ValueType.STRING:
            return self._strings(key, span)
        if span.type is ValueType.ARRAY:
            offset = span.offset
            nested: list[Any] = []
            for _ in range(span.length):
                elements, offset = self._elements(key, self._nested(offset))
                nested.append(elements)
            return nested, offset
        letter = SCALAR_FORMATS[span.type]
        end = span.offset + span.length * _SCALARS[span.type].size
        values = struct.unpack_from(f"<{span.length}{letter}", self._view, span.offset)
        if span.type is ValueType.BOOL:
            if span.length and max(values) > 1:
                raise GGUFError(self._path, key, span.offset, "array of booleans holds something else than 0 and 1")
            return [bool(value) for value in values], end
        return list(values), end

    def _nested(self, offset: int) -> ArraySpan:
        type, length = _ARRAY_HEAD.unpack_from(self._view, offset)
        return ArraySpan(ValueType(type), length, offset + _ARRAY_HEAD.size)

    def _strings(self, key: str, span: ArraySpan) -> tuple[list[str], int]:
        offset, view, unpack = span.offset, self._view, _LENGTH.unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(span.length):
                start = offset + 8
                offset = start + unpack(view, offset)[0]
                append(str(view[start:offset], "utf-8"))
        except UnicodeDecodeError as problem:
            raise GGUFError(self._path, f"{key}[{len(strings)}]", start, f"not UTF-8: {problem.reason}") from None
        return strings, offset
