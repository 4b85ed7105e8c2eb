"""Byte-pair encoding with a list of merges: on the byte alphabet (`tokenizer.ggml.model` = gpt2), by the `tokenizers`
library, and on plain text with ▁ for spaces (gemma4), by our own merging.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ollamapy.tokenizer.library import ids_of
from ollamapy.tokenizer.merge import SPACE, Merger, piece_pattern
from ollamapy.tokenizer.pretokenize import Pretokenizer
from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary, wrong

_BEFORE_INNER_SPACE = re.compile(f"([^{SPACE} \n]) ?{SPACE}")


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for the
    characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: byte for byte in printable} | {0x100 + n: byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def decode_byte_alphabet(text: str) -> bytes:
    """The bytes that a token's text stands for; text outside the alphabet stands for itself in UTF-8."""
    if not all(ord(character) in BYTE_OF for character in text):
        return text.encode()
    return text.translate(BYTE_OF).encode("latin-1")


class ByteLevelBPE:
    def __init__(self, vocabulary: Vocabulary, rules: Pretokenizer) -> None:
        merges: list[Any] = [tuple(merge.split(" ")) for merge in vocabulary.merges()]
        if set(map(len, merges)) - {2}:
            bad = next(i for i, merge in enumerate(merges) if len(merge) != 2)
            raise wrong("merges", f'entry {bad} is not "left right"')
        self._tokenizer: Any = Tokenizer(_checked_bpe(vocabulary, merges, rules.ignore_merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a stretch of text without special tokens. Spaces are part of words here, so `at_start` changes nothing."""
        return ids_of(self._tokenizer, text)


def _checked_bpe(vocabulary: Vocabulary, merges: list[Any], ignore_merges: bool) -> Any:
    try:
        return models.BPE(vocab=vocabulary.index, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library has no class of its own for this
        raise wrong("merges", f"do not fit the vocabulary: {error}") from None


class PlainBPE:
    def __init__(self, vocabulary: Vocabulary, unk_id: int | None) -> None:
        """Control, unknown, unused and byte tokens cannot come out of merging."""
        merges = vocabulary.merges()
        if not all(map(_has_two_sides, merges)):
            bad = next(i for i, merge in enumerate(merges) if not _has_two_sides(merge))
            raise wrong("merges", f'entry {bad} is not "left right"')
        ids = dict(vocabulary.index)
        for id in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED, TokenType.BYTE):
            if vocabulary.index[vocabulary.tokens[id]] == id:
                del ids[vocabulary.tokens[id]]
        ranks: dict[str, float] = dict(zip(reversed(merges), count(len(merges) - 1, -1)))
        self._merger = Merger(ranks, " ", ids, vocabulary.byte_ids, unk_id)
        self._pieces = piece_pattern(_BEFORE_INNER_SPACE.findall("\n".join(merges)), newline_runs=True)
        self._ids = ids

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a stretch of text without special tokens. A run of newlines that is a token needs no merges."""
        ids: list[int] = []
        for piece in self._pieces.findall(text.replace(" ", SPACE)):
            if piece[0] == "\n" and piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids += self._merger.encode(piece)
        return ids


def _has_two_sides(merge: str) -> bool:
    return 0 < merge.find(" ", 1) < len(merge) - 1
