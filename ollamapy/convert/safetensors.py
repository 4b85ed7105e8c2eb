"""Tensors of a safetensors file as float32 arrays. Knows no names and no model; trusts nothing that the file says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ollamapy.errors import BadRequest

MAX_HEADER = 100_000_000  # bytes, the format's own limit
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """An open file (https://github.com/huggingface/safetensors): tensors by name. Raises BadRequest for one that is malformed;
    `name` is what its user calls it."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise self._wrong("its header is longer than the file")
            head = file.read(length)
        try:
            header = msgspec.json.decode(head, type=dict[str, Any])
            header.pop("__metadata__", None)
            self._entries = msgspec.convert(header, dict[str, _Entry])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise self._wrong(f"its header is damaged ({error})") from None
        self._data = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.empty(0, np.uint8)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return len(self._data)

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A copy in float32."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise self._wrong(f"{name} has the type {entry.dtype}, which is none of {', '.join(_DTYPES)}")
        start, end = entry.data_offsets
        wanted = math.prod(entry.shape) * np.dtype(dtype).itemsize
        if min(entry.shape, default=1) < 0 or not 0 <= start <= end <= len(self._data) or end - start != wanted:
            raise self._wrong(f"{name} does not lie within it, or has another size than its shape says")
        values = np.frombuffer(self._data[start:end].tobytes(), dtype)
        if entry.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32).reshape(entry.shape)

    def _wrong(self, problem: str) -> BadRequest:
        return BadRequest(f"{self._name}: not a good safetensors file: {problem}")
