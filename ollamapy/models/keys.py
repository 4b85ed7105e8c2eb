"""Typed reads of GGUF metadata under one architecture's prefix. No torch; knows no key's meaning.

A value of the wrong type, sign or length is an UnsupportedModel that names the key and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ollamapy.errors import UnsupportedModel

Value = TypeVar("Value", int, float, bool, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Keys:
    """`keys.integer("a", "b", default=0)` is the first of `<architecture>.a`, `<architecture>.b` that the file has.

    Without a default, an absent key raises.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, f"{architecture}."

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._metadata

    def array_length(self, key: str) -> int:
        """Length of an array under its full name, 0 when absent; a GGUF reader's mapping does not decode it for this."""
        length: Callable[[str], int | None] | None = getattr(self._metadata, "array_length", None)
        if length is not None:
            return length(key) or 0
        return len(self._metadata.get(key, ()))

    def integer(self, *names: str, default: int | None = None) -> int:
        return self._read(names, default, _is_integer, int, "a non-negative integer")

    def number(self, *names: str, default: float | None = None) -> float:
        return self._read(names, default, _is_number, float, "a finite number")

    def boolean(self, *names: str, default: bool | None = None) -> bool:
        return self._read(names, default, lambda value: isinstance(value, bool), bool, "a boolean")

    def string(self, *names: str, default: str | None = None) -> str:
        return self._read(names, default, lambda value: isinstance(value, str), str, "a string")

    def is_list(self, name: str) -> bool:
        return isinstance(self._metadata.get(self._prefix + name), list | tuple)

    def per_layer(self, name: str, num_layers: int, default: int | None = None) -> tuple[int, ...]:
        """An integer for each layer, from an array with one per layer or from a scalar for all."""
        if not self.is_list(name):
            return (self.integer(name, default=default),) * num_layers
        values = self._metadata[self._prefix + name]
        if len(values) != num_layers or not all(map(_is_integer, values)):
            raise self._error(name, f"must hold {num_layers} non-negative integers, one per layer", values)
        return tuple(values)

    def flags(self, name: str, num_layers: int) -> tuple[bool, ...]:
        """A boolean for each layer, from an array of booleans (or of 0 and 1)."""
        values = self._metadata[self._prefix + name]
        if len(values) != num_layers or not all(value in (0, 1) for value in values):
            raise self._error(name, f"must hold {num_layers} booleans, one per layer", values)
        return tuple(bool(value) for value in values)

    def _read(
        self,
        names: tuple[str, ...],
        default: Value | None,
        fits: Callable[[Any], bool],
        cast: Callable[[Any], Value],
        kind: str,
    ) -> Value:
        for name in names:
            value = self._metadata.get(self._prefix + name)
            if value is not None:
                if not fits(value):
                    raise self._error(name, f"must be {kind}", value)
                return cast(value)
        if default is None:
            raise UnsupportedModel(f"the model file has no key {self._prefix}{names[0]}")
        return default

    def _error(self, name: str, problem: str, value: Any) -> UnsupportedModel:
        found = repr(value)
        return UnsupportedModel(f"{self._prefix}{name} {problem}, not {found if len(found) <= 60 else found[:57] + '...'}")
