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
        self._bytes = tokenizer.shown_bytes if skip_special else tokenizer.token_bytes
        self._strip = tokenizer.strips_first_space and not continues
        self._decoder = _Utf8Decoder("replace")
        self._partial = False  # the decoder may hold a part of a character

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete; "" when there are none yet."""
        raw = b"".join(map(self._bytes, ids))
        if raw and self._strip:
            self._strip = False
            raw = raw.removeprefix(b" ")
        if not self._partial and raw.isascii():
            return raw.decode("ascii")
        self._partial = True
        text = self._decoder.decode(raw)
        self._partial = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """Ends the text."""
        return self._decoder.decode(b"", final=True)
