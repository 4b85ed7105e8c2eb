"""WordPiece (`tokenizer.ggml.model` = bert): BERT's normalization by the `tokenizers` library, the longest match by ours.

The library's own matching takes n^2 steps on a word of n characters (1.4 s for 4,000), or calls it unknown.
"""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers, pre_tokenizers

from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary

_WORD_START = "▁"
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 64


class WordPiece:
    def __init__(self, vocabulary: Vocabulary, unk_id: int | None) -> None:
        """In GGUF a token that begins a word starts with ▁ (WordPiece has it bare), one that goes on does not (##)."""
        control = set(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
        self._ids = {text: id for text, id in vocabulary.index.items() if id not in control}
        self._longest = max(map(len, self._ids), default=1)
        self._unknown = [] if unk_id is None else [unk_id]
        lowercase = vocabulary.fields.flag("normalizer.lowercase", True)
        strip_accents = vocabulary.fields.flag("normalizer.strip_accents", lowercase)
        self._normalizer: Any = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        self._words: Any = pre_tokenizers.BertPreTokenizer()
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a stretch of text without special tokens."""
        ids: list[int] = []
        for word, _ in self._words.pre_tokenize_str(self._normalizer.normalize_str(text)):
            found = self._cache.get(word)
            if found is None:
                found = self._match(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(self._cache) >= _CACHED_WORDS:
                        self._cache.clear()
                    self._cache[word] = found
            ids += found
        return ids

    def _match(self, word: str) -> list[int]:
        """The longest token at each place; a word with a place where none fits is unknown as a whole."""
        word = _WORD_START + word
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                id = self._ids.get(word[start:end])
                if id is not None:
                    ids.append(id)
                    start = end
                    break
            else:
                return self._unknown
        return ids
