"""Small vocabularies as GGUF metadata, and what SentencePiece itself makes of a corpus."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the hounds",
    "pack my box with five dozen liquor jugs, said the man in the hat",
    "how vexingly quick daft zebras jump; the five boxing wizards jump quickly",
    "el veloz murciélago hindú comía feliz cardillo y kiwi",
    "aaaa aaaa aaa aa a -- --- ---- == === ==== 12 123 1234 12345",
    "in the beginning there was nothing, which exploded into everything there is",
] * 4


def metadata(model: str, tokens: list[str], **keys: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` with `model`, `tokens` and `keys`; a key with a dot is taken as it is."""
    made: dict[str, Any] = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": tokens}
    made.update({key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    return made


def spm_metadata(pieces: Mapping[str, float], added: Mapping[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """SentencePiece BPE: <unk>, <s>, </s>, the 256 bytes, `pieces` with their scores, then `added` with their types."""
    added = added or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *added]
    scores = [0.0] * 259 + list(pieces.values()) + [0.0] * len(added)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + list(added.values())
    return metadata("llama", tokens, scores=scores, token_type=types, **keys)


def byte_alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in GPT-2's vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe_metadata(merges: list[str], added: Mapping[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Byte-level BPE: the alphabet, what `merges` make, then `added` with their types."""
    added = added or {}
    made = dict.fromkeys(merge.replace(" ", "", 1) for merge in merges)
    tokens = [*byte_alphabet(), *made, *added]
    types = [NORMAL] * (256 + len(made)) + list(added.values())
    keys = {"pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 0, **keys}
    return metadata("gpt2", tokens, merges=merges, token_type=types, **keys)


def train_sentencepiece(**options: Any) -> tuple[Any, list[tuple[str, float, int]], bytes]:
    """A processor trained on CORPUS, its (piece, score, type) list and its normalization table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SWIG types without __module__
        import sentencepiece

    model = io.BytesIO()
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options)
    pieces, charsmap = [], b""
    for number, value in _fields(model.getvalue()):
        if number == 1:
            piece = dict(_fields(value))
            score: float = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), pieces, charsmap


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[position : position + size]
        position += size
