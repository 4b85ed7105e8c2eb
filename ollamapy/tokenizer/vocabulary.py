"""The tokenizer's part of GGUF metadata, read with suspicion: types, lengths and ranges are checked, keys are named in
errors. Knows files' dialects; knows nothing of how text is cut.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import isfinite
from typing import Any

from ollamapy.errors import TokenizerError

PREFIX = "tokenizer.ggml."
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_KINDS = {"llama": "spm", "gpt2": "bpe", "gemma4": "bpe", "bert": "wordpiece", "t5": "unigram"}


class TokenType(IntEnum):
    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Fields:
    """Typed access to the keys under `tokenizer.ggml.`; a value of the wrong type is a TokenizerError naming its key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def __contains__(self, key: str) -> bool:
        return PREFIX + key in self._metadata

    def general(self, key: str) -> str:
        """A text under `general.`, or ""."""
        value = self._metadata.get(f"general.{key}", "")
        return value if isinstance(value, str) else ""

    def text(self, key: str, default: str = "") -> str:
        value = self._metadata.get(PREFIX + key, default)
        if not isinstance(value, str):
            raise wrong(key, f"must be a string, not {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(PREFIX + key, default)
        if value not in (0, 1) or not isinstance(value, int):
            raise wrong(key, f"must be a boolean, not {_short(value)}")
        return bool(value)

    def integer(self, key: str) -> int | None:
        value = self._metadata.get(PREFIX + key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise wrong(key, f"must be an integer, not {_short(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self._array(key)
        if set(map(type, values)) - {str}:
            raise wrong(key, "must be an array of strings")
        return values

    def integers(self, key: str) -> list[int]:
        values = self._array(key)
        if set(map(type, values)) - {int}:
            raise wrong(key, "must be an array of integers")
        return values

    def floats(self, key: str) -> list[float]:
        values = self._array(key)
        if set(map(type, values)) - {float, int} or not all(map(isfinite, values)):
            raise wrong(key, "must be an array of finite numbers")
        return values

    def _array(self, key: str) -> list[Any]:
        values = self._metadata.get(PREFIX + key)
        if values is None:
            raise wrong(key, "is missing")
        if not isinstance(values, (list, tuple)):
            raise wrong(key, f"must be an array, not {type(values).__name__}")
        return list(values)


def wrong(key: str, problem: str) -> TokenizerError:
    return TokenizerError(f"{PREFIX}{key}: {problem}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their types and scores (index = id), and the names that choose how text is cut.

    `types` starts as the file has it; `special.read_special` corrects it in place before anything else looks.
    """

    fields: Fields
    kind: str  # spm | bpe | wordpiece | unigram
    pre: str
    tokens: list[str]
    types: bytearray
    scores: list[float]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], embedding_rows: int | None = None) -> Vocabulary:
        """Raises TokenizerError. Tokens from `embedding_rows` on have no embedding and are dropped."""
        fields = Fields(metadata)
        tokens = fields.strings("tokens")
        if not tokens:
            raise wrong("tokens", "is empty")
        types = fields.integers("token_type") if "token_type" in fields else [int(TokenType.NORMAL)] * len(tokens)
        scores = fields.floats("scores") if "scores" in fields else [0.0] * len(tokens)
        for key, values in (("token_type", types), ("scores", scores)):
            if len(values) != len(tokens):
                raise wrong(key, f"has {len(values)} entries for {len(tokens)} tokens")
        unknown = set(types) - set(TokenType)
        if unknown:
            raise wrong("token_type", f"unknown types {sorted(unknown)[:8]}")
        kind, pre = _kind_and_pre(fields, len(tokens))
        if kind in ("spm", "unigram") and "scores" not in fields:
            raise wrong("scores", f"is missing, and {fields.text('model')!r} needs it")
        rows = len(tokens) if embedding_rows is None else embedding_rows
        vocabulary = cls(fields, kind, pre, tokens[:rows], bytearray(types[:rows]), scores[:rows])
        vocabulary._check_byte_tokens()
        return vocabulary

    def _check_byte_tokens(self) -> None:
        for id in self.of_type(TokenType.BYTE):
            if not _BYTE_TOKEN.fullmatch(self.tokens[id]):
                raise wrong("tokens", f"token {id} has the type of a byte and the text {_short(self.tokens[id])}, not <0xNN>")

    @cached_property
    def index(self) -> dict[str, int]:
        """Text -> id; of repeated texts the first id."""
        return dict(zip(reversed(self.tokens), range(len(self.tokens) - 1, -1, -1), strict=True))

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of these types, ascending."""
        wanted = re.compile(b"[%b]" % re.escape(bytes(types)))
        return [match.start() for match in wanted.finditer(self.types)]

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """Byte value -> id of its `<0xNN>` token."""
        return {int(self.tokens[id][3:5], 16): id for id in reversed(self.of_type(TokenType.BYTE))}

    def merges(self) -> list[str]:
        """Merges in order of rank, as "left right"."""
        return self.fields.strings("merges")

    def charsmap(self) -> bytes:
        """The precompiled normalization table, or b"". Some published files hold its base64 text instead."""
        if "precompiled_charsmap" not in self.fields:
            return b""
        values = self.fields.integers("precompiled_charsmap")
        if values and not -128 <= min(values) <= max(values) <= 255:
            raise wrong("precompiled_charsmap", "must be an array of bytes")
        table = bytes(value & 255 for value in values)
        if table and not _is_charsmap(table):
            try:
                table = base64.b64decode(table, validate=True)
            except binascii.Error:
                table = b""
            if not _is_charsmap(table):
                raise wrong("precompiled_charsmap", f"{len(values)} bytes that are no normalization table")
        return table


def _is_charsmap(table: bytes) -> bool:
    """True when the length of the trie that the first four bytes state is possible."""
    trie = int.from_bytes(table[:4], "little")
    return len(table) > 4 and 0 < trie < len(table) - 4 and trie % 4 == 0


def _kind_and_pre(fields: Fields, num_tokens: int) -> tuple[str, str]:
    """The kind of tokenizer, and the pre-tokenizer's name, with what older published files leave out or misname."""
    model, pre, architecture = fields.text("model"), fields.text("pre"), fields.general("architecture")
    if not model:
        raise wrong("model", "is missing")
    if architecture == "gemma4" or model == "gemma4":
        return "bpe", "gemma4"
    if model not in _KINDS:
        raise wrong("model", f"unsupported tokenizer {_short(model)}; supported: {', '.join(sorted(_KINDS))}")
    if pre in ("", "default") and model == "gpt2":
        if architecture == "llama" and num_tokens == 128256:
            pre = "llama-bpe"
        elif architecture == "mistral3":
            pre = "tekken"
    if not pre:
        pre = {"gptoss": "gpt-4o", "gpt-oss": "gpt-4o", "lfm2": "lfm2"}.get(architecture, "default")
    return _KINDS[model], pre
