"""Digest: the only thing that names a blob. Made by its parser or by hashing bytes, and by nothing else."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ollamapy.errors import BadRequest

if TYPE_CHECKING:
    from hashlib import _Hash

_TEXT = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)
_MENTIONED = re.compile(rb"sha256[:-]([0-9a-fA-F]{64})")
_MAKE = object()


class Digest:
    """A SHA-256. `text` is "sha256:<hex>", `file_name` "sha256-<hex>"; hex is lower case."""

    __slots__ = ("hex",)

    def __init__(self, hex: str, make: object = None) -> None:
        if make is not _MAKE:
            raise TypeError("a Digest is made by Digest.parse, .of or .from_hash")
        self.hex = hex

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Raises BadRequest ("invalid digest format") for all but sha256:<64 hex> and sha256-<64 hex>."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise BadRequest("invalid digest format")
        return cls(match[1].lower(), _MAKE)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        return cls(hashlib.sha256(data).hexdigest(), _MAKE)

    @classmethod
    def from_hash(cls, sha256: _Hash) -> Digest:
        assert sha256.name == "sha256"
        return cls(sha256.hexdigest(), _MAKE)

    @classmethod
    def mentioned(cls, data: bytes) -> set[Digest]:
        """Every digest that stands anywhere in the bytes, be they a whole manifest or a torn one."""
        return {cls(match.decode().lower(), _MAKE) for match in _MENTIONED.findall(data)}

    @property
    def text(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def file_name(self) -> str:
        return f"sha256-{self.hex}"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Digest({self.text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.hex == other.hex

    def __hash__(self) -> int:
        return hash(self.hex)
