"""SentencePiece BPE (`tokenizer.ggml.model` = llama): merges follow from the scores of the merged tokens.

Runs on the vocabulary as it is. Writing the merges out for a `tokenizers` model gives the same ids; for Gemma's 262,144
tokens (513,511 merges) that took 1.6 s and 250 MB against 0.1 s here, and then encoded at 2 to 8 MB/s against 1 to 4.
"""

from __future__ import annotations

import re
from operator import neg

from ollamapy.tokenizer.merge import SPACE, Merger, piece_pattern
from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary

_BEFORE_INNER_SPACE = re.compile(f"([^{SPACE} ]){SPACE}")


class SentencePiece:
    def __init__(self, vocabulary: Vocabulary, unk_id: int | None) -> None:
        """Only plain tokens can come out of merging: text never turns into a control token here."""
        tokens = vocabulary.tokens
        ids = dict(vocabulary.index)
        ranks: dict[str, float] = dict(zip(reversed(tokens), map(neg, reversed(vocabulary.scores)), strict=True))
        for id in vocabulary.of_type(*set(TokenType) - {TokenType.NORMAL, TokenType.UNDEFINED}):
            if vocabulary.index[tokens[id]] == id:
                del ids[tokens[id]], ranks[tokens[id]]
        self._merger = Merger(ranks, "", ids, vocabulary.byte_ids, unk_id)
        self._pieces = piece_pattern(_BEFORE_INNER_SPACE.findall(" ".join(ranks)))
        self._space_prefix = vocabulary.fields.flag("add_space_prefix", True)

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a stretch of text without special tokens; `at_start`: it begins the text or follows a special token."""
        text = text.replace(" ", SPACE)
        if at_start and self._space_prefix:
            text = SPACE + text
        ids: list[int] = []
        for piece in self._pieces.findall(text):
            ids += self._merger.encode(piece)
        return ids
