"""Finding tags in text that arrives in pieces: what may be the start of a tag is held back. Knows no meaning of tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Split(NamedTuple):
    """`before` is free of tags and may be shown; `tag` is the one found, "" when none; `rest` follows it or is held back."""

    before: str
    tag: str
    rest: str


def held_back(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that a tag could start with (shorter than the whole tag)."""
    longest = min(len(text), max((len(tag) for tag in tags), default=1) - 1)
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(tag.startswith(end) for tag in tags):
            return size
    return 0


def split(text: str, tags: Sequence[str], done: bool = False) -> Split:
    """Cuts `text` at its first tag; of tags that start at the same place, the longest. `done`: nothing more will come.

    Whatever may yet become a tag that starts earlier, or a longer one, is held back.
    """
    start, size = min(((text.find(tag), -len(tag)) for tag in tags if tag in text), default=(len(text), 0))
    held = len(text) if done else len(text) - held_back(text, tags)
    if held < len(text) and held <= start:
        return Split(text[:held], "", text[held:])
    return Split(text[:start], text[start : start - size], text[start - size :])
