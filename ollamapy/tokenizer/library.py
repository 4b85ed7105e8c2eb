"""Encoding by the `tokenizers` library so that other threads run meanwhile. Knows no vocabulary."""

from __future__ import annotations

from typing import Any

_ALONE = 8192  # characters; a longer text takes milliseconds


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, without any around it.

    `encode` keeps Python's lock: 0.9 s for 2 MB of GPT-2's kind, in which a daemon answers nobody. A batch does not, but the
    first one starts a thread per core, which those who only encode short texts are spared.
    """
    if len(text) < _ALONE:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = encoded.ids
    return ids
