"""`serve` of bench/fake_engine with a tokenizer that fails: on prompts with BAD_PROMPT, and on tokens with BAD_TOKEN's text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from bench import fake_engine
from ollamapy.tokenizer import StreamDecoder, Tokenizer

BAD_PROMPT, BAD_TOKEN = "xyzzy", " w666"

if __name__ == "__main__":
    encode, feed = Tokenizer.encode, StreamDecoder.feed

    def failing_encode(self: Tokenizer, text: str, **given: bool) -> list[int]:
        if BAD_PROMPT in text:
            raise IndexError("a secret of the tokenizer")
        return encode(self, text, **given)

    def failing_feed(self: StreamDecoder, ids: Iterable[int]) -> str:
        if BAD_TOKEN in (text := feed(self, ids)):
            raise KeyError("a secret of the detokenizer")
        return text

    Tokenizer.encode, StreamDecoder.feed = failing_encode, failing_feed  # type: ignore[method-assign, assignment]
    sys.exit(fake_engine.serve())
