"""GGUF files byte by byte, right or wrong: what the writer refuses to make. Independent of the package's own layouts."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(
    name: str | bytes = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    """`shape` in the file's order: the row length first."""
    head = text(name) + struct.pack("<I", len(shape) if dims is None else dims)
    return head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


@dataclass
class File:
    """`bytes()` puts the parts together; each default makes a valid file of one tensor with four floats."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    keys: list[bytes] = field(default_factory=lambda: [ARCHITECTURE])
    tensors: list[bytes] = field(default_factory=lambda: [tensor()])
    num_keys: int | None = None
    num_tensors: int | None = None
    data: bytes = bytes(16)
    alignment: int = 32

    def __bytes__(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + self.version + struct.pack("<QQ", num_tensors, num_keys)
        head += b"".join(self.keys) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data
