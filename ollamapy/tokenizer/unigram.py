"""Unigram language model (`tokenizer.ggml.model` = t5): the likeliest cut by the tokens' log probabilities, found by the
`tokenizers` library. Spaces are put in place here, as SentencePiece's normalizer does.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ollamapy.tokenizer.charsmap import CharsMap
from ollamapy.tokenizer.library import ids_of
from ollamapy.tokenizer.merge import SPACE
from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary, wrong

_INNER_SPACE = re.compile(f"[^{SPACE}]{SPACE}")
_FIRST_LETTER = re.compile("[^ ]")


class Unigram:
    def __init__(self, vocabulary: Vocabulary, unk_id: int | None) -> None:
        """Tokens that text must not turn into get an empty text, which nothing matches."""
        if unk_id is None:
            raise wrong("unknown_token_id", "is missing, and a unigram tokenizer needs it")
        hidden = set(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE, TokenType.UNDEFINED))
        first = vocabulary.index
        pieces = [
            ("", 0.0) if id in hidden or first[text] != id else (text, score)
            for id, (text, score) in enumerate(zip(vocabulary.tokens, vocabulary.scores, strict=True))
        ]
        for id in vocabulary.of_type(TokenType.USER_DEFINED):
            pieces[id] = (pieces[id][0], 0.0)
        self._unk_id = unk_id
        self._tokenizer: Any = Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
        if not any(_INNER_SPACE.search(text) for text, _ in pieces):
            words = Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
            self._tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
        charsmap = vocabulary.charsmap()
        self._charsmap = CharsMap(charsmap) if charsmap else None
        self._space_prefix = vocabulary.fields.flag("add_space_prefix", True)
        self._merge_spaces = vocabulary.fields.flag("remove_extra_whitespaces", False)

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a stretch of text without special tokens. Every stretch gets its own leading space."""
        text = self._spaced(text if self._charsmap is None else self._charsmap.normalize(text))
        ids = ids_of(self._tokenizer, text) if text else []
        return [id for n, id in enumerate(ids) if id != self._unk_id or n == 0 or ids[n - 1] != id]

    def _spaced(self, text: str) -> str:
        if self._merge_spaces:
            return "".join(SPACE + word for word in text.split(" ") if word)
        first = _FIRST_LETTER.search(text)
        if first and self._space_prefix:
            text = text[: first.start()] + " " + text[first.start() :]
        return text.replace(" ", SPACE)
