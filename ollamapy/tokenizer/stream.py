"""Text of token ids as they come: complete characters only. Knows no stop strings and no formats."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ollamapy.tokenizer.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """What `feed` and then `flush` return, put together, is `decode` of all the ids. Bytes that cannot be part of a
    character any more become U+FFFD at once; an incomplete character at the end becomes U+FFFD in `flush`.

    `continues`: the ids go on from text that is already there, so the first one's leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._strip = tokenizer.strips_first_space and not continues
        self._decoder = _Utf8Decoder("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete; "" when there are none yet."""
        tokenizer = self._tokenizer
        raw = b"".join(tokenizer.token_bytes(id) for id in ids if not (self._skip_special and tokenizer.is_control(id)))
        if raw and self._strip:
            self._strip = False
            raw = raw.removeprefix(b" ")
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """Ends the text."""
        return self._decoder.decode(b"", final=True)
