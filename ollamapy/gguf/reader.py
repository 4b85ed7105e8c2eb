"""Memory-mapped GGUF reader: versions 2 and 3, little endian, split files joined. No torch, no numpy.

Refuses to know what keys and tensors mean. Opening reads the header only, and believes nothing in it: counts, lengths,
offsets, alignment, overlaps and sizes are checked against the bytes of the file. Format: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ollamapy.errors import GGUFError
from ollamapy.gguf.metadata import MAX_KEYS, MAX_NAME_BYTES, Cursor, Metadata
from ollamapy.gguf.types import MAX_DIMS, REMOVED_TYPES, TYPES, GGMLType, ValueType, align, num_elements, tensor_nbytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_TENSORS = 1 << 18
MAX_PARTS = 1 << 12

_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, a byte of key, type, a byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # length, a byte of name, number of dimensions, type, offset
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class TensorInfo(NamedTuple):
    """A tensor as the file describes it. `shape` is in torch order: rows last, the reverse of the file's order."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    nbytes: int
    offset: int  # of the first byte, from the start of the part
    part: int  # 0 unless the file is split


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    view: memoryview
    version: int
    alignment: int
    metadata: Metadata
    tensors: list[TensorInfo]


class GGUFFile:
    """An open GGUF file (all parts of it). Use as a context manager, or close it.

    `metadata` is that of the first part. Memory stays mapped while a view from `data` or the metadata is alive.
    """

    def __init__(self, parts: list[_Part]) -> None:
        first = parts[0]
        self.path, self.version, self.alignment, self.metadata = first.path, first.version, first.alignment, first.metadata
        self.part_paths = tuple(part.path for part in parts)
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for tensor in part.tensors:
                if tensor.name in self.tensors:
                    raise GGUFError(part.path, tensor.name, tensor.offset, "tensor is already in another part")
                self.tensors[tensor.name] = tensor
        self._views = [part.view for part in parts]

    @classmethod
    def open(cls, path: Path | str, *more: Path | str) -> GGUFFile:
        """Opens a file, or the first part of a split one; `more` names the other parts where the names do not tell.

        Raises GGUFError for a malformed file or an incomplete set of parts, OSError where a file cannot be opened.
        """
        first = _open_part(Path(path), 0)
        count = _split_integer(first, "split.count", 1, MAX_PARTS)
        if count == 1:
            return cls([first])
        others = [Path(other) for other in more] or _sibling_parts(first, count)
        if len(others) != count - 1:
            raise GGUFError(first.path, "split.count", 0, f"{count} parts expected, {len(others) + 1} given")
        parts = [first]
        for index, other in enumerate(others, start=1):
            if not other.is_file():
                raise GGUFError(first.path, "split.count", 0, f"part {index + 1} of {count} is missing: {other.name}")
            parts.append(_open_part(other, index))
        _check_split(parts, count)
        return cls(parts)

    def data(self, name: str) -> memoryview:
        """The tensor's bytes, read-only, not copied. KeyError for a name that is not in `tensors`."""
        tensor = self.tensors[name]
        return self._views[tensor.part][tensor.offset : tensor.offset + tensor.nbytes]

    def close(self) -> None:
        """Lets go of the mapping. Views that were given out stay valid; the pages of the whole file, which one of them would
        keep in this process's memory, are given back to the page cache until they are touched again."""
        for view in self._views:
            view.obj.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        self._views = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _map(path: Path) -> memoryview:
    """The whole file as memory. Non-blocking open: a fifo must be refused, not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(path, "file", 0, "not a regular file")
        if status.st_size == 0:
            raise GGUFError(path, "magic", 0, "the file is empty")
        return memoryview(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def _open_part(path: Path, part: int) -> _Part:
    view = _map(path)
    cursor = Cursor(path, view)
    version = _version(cursor)
    num_tensors = cursor.count("tensor count", MAX_TENSORS, _MIN_TENSOR_BYTES)
    num_keys = cursor.count("key count", MAX_KEYS, _MIN_KEY_BYTES)
    metadata = Metadata.scan(cursor, num_keys)
    alignment = _alignment(cursor, metadata)
    tensors = [_tensor_info(cursor, index, part, alignment) for index in range(num_tensors)]
    data_start = align(cursor.offset, alignment)
    placed = [tensor._replace(offset=tensor.offset + data_start) for tensor in tensors]
    _check_layout(cursor, placed)
    return _Part(path, view, version, alignment, metadata, placed)


def _version(cursor: Cursor) -> int:
    cursor.need("magic", 4)
    magic = bytes(cursor.view[:4])
    if magic != MAGIC:
        raise cursor.error("magic", f"{magic!r} is not {MAGIC!r}: not a GGUF file")
    cursor.offset = 4
    version: int = cursor.unpack("version", _U32)
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise cursor.error("version", "big-endian files are not supported", 4)
    raise cursor.error("version", f"{version} is not supported (supported: 2, 3)", 4)


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    kind, alignment = metadata.typed("general.alignment")
    if kind is not ValueType.UINT32 or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error("general.alignment", f"{alignment!r} is not a power of two of type uint32")
    return int(alignment)


def _tensor_info(cursor: Cursor, index: int, part: int, alignment: int) -> TensorInfo:
    """One entry of the tensor table; its offset still counts from the start of the data."""
    start = cursor.offset
    name = cursor.string(f"tensor {index}", MAX_NAME_BYTES)
    if not name:
        raise cursor.error(f"tensor {index}", "empty name", start)
    num_dims: int = cursor.unpack(name, _U32)
    if num_dims > MAX_DIMS:
        raise cursor.error(name, f"{num_dims} dimensions, the limit is {MAX_DIMS}", cursor.offset - 4)
    dims_at = cursor.offset
    shape = tuple(reversed([int(cursor.unpack(name, _U64)) for _ in range(num_dims)]))
    if 0 in shape:
        raise cursor.error(name, f"dimension 0 in shape {shape}", dims_at)
    if num_elements(shape) >= 1 << 63:
        raise cursor.error(name, f"shape {shape} has 2^63 elements or more", dims_at)
    type = _tensor_type(cursor, name)
    try:
        nbytes = tensor_nbytes(type, shape)
    except ValueError as problem:
        raise cursor.error(name, str(problem), dims_at) from None
    offset_at = cursor.offset
    offset: int = cursor.unpack(name, _U64)
    if offset % alignment:
        raise cursor.error(name, f"data offset {offset} is not a multiple of the alignment {alignment}", offset_at)
    return TensorInfo(name, type, shape, nbytes, offset, part)


def _tensor_type(cursor: Cursor, name: str) -> GGMLType:
    start = cursor.offset
    number: int = cursor.unpack(name, _U32)
    if number in REMOVED_TYPES:
        raise cursor.error(name, f"type {REMOVED_TYPES[number]} no longer exists in GGUF; convert the model again", start)
    if number not in TYPES:
        raise cursor.error(name, f"unknown tensor type {number}", start)
    return GGMLType(number)


def _check_layout(cursor: Cursor, tensors: list[TensorInfo]) -> None:
    """Names are unique, data lies inside the file, and no two tensors share a byte."""
    size = len(cursor.view)
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise cursor.error(tensor.name, "duplicate tensor")
        names.add(tensor.name)
        if tensor.offset + tensor.nbytes > size:
            end = tensor.offset + tensor.nbytes
            raise cursor.error(tensor.name, f"data ends at byte {end}, the file at {size}", tensor.offset)
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise cursor.error(after.name, f"data overlaps that of {before.name}", after.offset)


def _split_integer(part: _Part, key: str, default: int, limit: int) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise GGUFError(part.path, key, 0, f"{value!r} is not a number from 0 to {limit}")
    return value or default


def _sibling_parts(first: _Part, count: int) -> list[Path]:
    """Paths of parts 2..count, from the first part's name."""
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if match is None or int(match[3]) != count:
        raise GGUFError(first.path, "split.count", 0, f"the name of part 1 of {count} must end in -00001-of-{count:05}.gguf")
    if int(match[2]) != 1:
        raise GGUFError(first.path, "split.no", 0, f"this is part {int(match[2])} of {count}; open part 1")
    return [first.path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _check_split(parts: list[_Part], count: int) -> None:
    for index, part in enumerate(parts):
        number = _split_integer(part, "split.no", 0, MAX_PARTS)
        if number != index:
            raise GGUFError(part.path, "split.no", 0, f"{number} in the place of part {index}")
        if _split_integer(part, "split.count", 1, MAX_PARTS) != count:
            raise GGUFError(part.path, "split.count", 0, f"differs from the first part's {count}")
    total = sum(len(part.tensors) for part in parts)
    expected = _split_integer(parts[0], "split.tensors.count", total, MAX_TENSORS)
    if total != expected:
        raise GGUFError(parts[0].path, "split.tensors.count", 0, f"{expected} tensors expected, the parts hold {total}")


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins with GGUF's magic bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC
