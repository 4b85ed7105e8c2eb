"""Streaming GGUF writer, version 3 (and 2): a file appears under its name whole, or not at all. No torch, no numpy.

Never holds more than one tensor's bytes. `write_split` makes the `-00001-of-0000N` form.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

from ollamapy.gguf.reader import DEFAULT_ALIGNMENT, MAGIC, VERSIONS
from ollamapy.gguf.types import MAX_DIMS, SCALAR_FORMATS, GGMLType, GGUFValue, ValueType, align, tensor_nbytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

TensorData: TypeAlias = Union["Buffer", Callable[[], "Buffer"]]
"""A tensor's bytes, or a function that makes them when their turn comes."""

TensorSource: TypeAlias = tuple[str, GGMLType, Sequence[int], TensorData]
"""Name, type, shape in torch order (rows last), data."""

_INT_RANGES = (
    (ValueType.UINT32, 0, 1 << 32),
    (ValueType.INT32, -(1 << 31), 1 << 31),
    (ValueType.UINT64, 0, 1 << 64),
    (ValueType.INT64, -(1 << 63), 1 << 63),
)


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorSource],
    *,
    version: int = 3,
) -> None:
    """Writes a file through a temporary one beside it, fsync, and rename.

    Values: bool, str, int (uint32, or int32 when negative, or 64 bits when too large), float (float32), lists of one
    kind, or a GGUFValue where the type matters (`reader.Metadata.typed` gives those). `general.alignment` is obeyed.
    ValueError for values, shapes or data that do not fit the format: these are mistakes of the caller.
    """
    path = Path(path)
    if version not in VERSIONS:
        raise ValueError(f"cannot write GGUF version {version}")
    entries = list(tensors)
    alignment = _alignment(metadata)
    header = _header(metadata, entries, version, alignment)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(header)
            for name, type, shape, data in entries:
                _write_data(file, name, tensor_nbytes(type, shape), data, alignment)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_split(folder: Path, stem: str, metadata: Mapping[str, Any], parts: Sequence[Sequence[TensorSource]]) -> Path:
    """Writes one file per element of `parts`; the first carries all metadata. Returns the first part's path."""
    count, total = len(parts), sum(len(part) for part in parts)
    paths = [folder / f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
        own = {
            "split.no": GGUFValue(ValueType.UINT16, number),
            "split.count": GGUFValue(ValueType.UINT16, count),
            "split.tensors.count": GGUFValue(ValueType.INT32, total),
        }
        shared = metadata if number == 0 else {key: metadata[key] for key in ("general.alignment",) if key in metadata}
        write_gguf(path, {**shared, **own}, part)
    return paths[0]


def infer_type(value: Any) -> GGUFValue:
    """The default type of a plain Python value (the type of the elements, for a list)."""
    if isinstance(value, GGUFValue):
        return value
    if isinstance(value, list | tuple):
        flat = list(_leaves(value))
        kinds = {kind for item in flat for kind in (bool, int, float, str) if type(item) is kind}
        if kinds == {int}:
            return GGUFValue(_int_type(min(flat), max(flat), signed_first=True), value)
        if len(kinds) == 1:
            return GGUFValue(infer_type(flat[0]).type, value)
        raise ValueError("the type of an empty or mixed list must be given with a GGUFValue")
    if isinstance(value, bool):
        return GGUFValue(ValueType.BOOL, value)
    if isinstance(value, int):
        return GGUFValue(_int_type(value, value, signed_first=False), value)
    if isinstance(value, float):
        return GGUFValue(ValueType.FLOAT32, value)
    if isinstance(value, str):
        return GGUFValue(ValueType.STRING, value)
    raise ValueError(f"{type(value).__name__} is no GGUF value")


def _leaves(value: Any) -> Iterable[Any]:
    for item in value:
        if isinstance(item, list | tuple):
            yield from _leaves(item)
        else:
            yield item


def _int_type(low: int, high: int, signed_first: bool) -> ValueType:
    # Arrays of integers are int32 in every GGUF in the wild (token types, head counts); llama.cpp relies on it.
    ranges = sorted(_INT_RANGES, key=lambda row: row[0] is not ValueType.INT32) if signed_first else _INT_RANGES
    for kind, first, end in ranges:
        if first <= low and high < end:
            return kind
    raise ValueError(f"integers from {low} to {high} do not fit 64 bits")


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    number: int = value.value if isinstance(value, GGUFValue) else value
    if number <= 0 or number & (number - 1):
        raise ValueError(f"alignment {number} is not a power of two")
    return number


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _scalar(type: ValueType, value: Any) -> bytes:
    if type is ValueType.STRING:
        return _string(value)
    try:
        return struct.pack("<" + SCALAR_FORMATS[type], value)
    except (struct.error, OverflowError) as problem:
        raise ValueError(f"{value!r} is no {type.name}: {problem}") from None


def _array(type: ValueType, values: Sequence[Any]) -> bytes:
    head = struct.pack("<IQ", ValueType.ARRAY if _nested(values) else type, len(values))
    if _nested(values):
        return head + b"".join(_array(type, item) for item in values)
    if type is ValueType.STRING:
        return head + b"".join(_string(item) for item in values)
    try:
        return head + struct.pack(f"<{len(values)}{SCALAR_FORMATS[type]}", *values)
    except (struct.error, OverflowError) as problem:
        raise ValueError(f"not all values are {type.name}: {problem}") from None


def _nested(values: Sequence[Any]) -> bool:
    return bool(values) and isinstance(values[0], list | tuple)


def _value(value: Any) -> bytes:
    type, plain = infer_type(value)
    if isinstance(plain, list | tuple):
        return struct.pack("<I", ValueType.ARRAY) + _array(type, plain)
    return struct.pack("<I", type) + _scalar(type, plain)


def _header(metadata: Mapping[str, Any], entries: Sequence[TensorSource], version: int, alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", version, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for name, type, shape, _ in entries:
        if len(shape) > MAX_DIMS or any(size <= 0 for size in shape):
            raise ValueError(f"{name}: shape {tuple(shape)} does not fit GGUF")
        parts += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type, offset)]
        offset = align(offset + tensor_nbytes(type, shape), alignment)
    header = b"".join(parts)
    return header + bytes(align(len(header), alignment) - len(header))


def _write_data(file: BinaryIO, name: str, nbytes: int, data: TensorData, alignment: int) -> None:
    view = memoryview(data() if callable(data) else data).cast("B")
    if len(view) != nbytes:
        raise ValueError(f"{name}: {len(view)} bytes given, its type and shape need {nbytes}")
    file.write(view)
    file.write(bytes(align(nbytes, alignment) - nbytes))
