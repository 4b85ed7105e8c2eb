"""Finds special and user-defined tokens in raw text, before anything else cuts it.

Longer tokens (in UTF-8 bytes) win over shorter ones wherever they stand, as in llama.cpp; of equally long ones the lower
id. Knows nothing of the text between them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """`lstrip`, `rstrip`: ASCII white space before, or after, the token belongs to it."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


class AddedTokens:
    """A set of literal texts. A place in a text is looked at only where two characters stand that begin a token."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._by_text: dict[str, AddedToken] = {}
        for token in tokens:
            if token.text:
                self._by_text.setdefault(token.text, token)
        lengths: defaultdict[str, set[int]] = defaultdict(set)  # first two characters -> lengths in characters
        for text in self._by_text:
            lengths[text[:2]].add(len(text))
        for start, found in lengths.items():
            if start[0] in self._by_text:
                found.add(1)
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._ranks = sorted({len(text.encode()) for text in self._by_text}, reverse=True)
        self._start = _start_pattern(lengths)

    def split(self, text: str) -> Iterator[str | int]:
        """The text's parts in order: ids of tokens, and the non-empty strings between them."""
        position = 0
        for start, end, id in self._find(text):
            if start > position:
                yield text[position:start]
            yield id
            position = end
        if position < len(text):
            yield text[position:]

    def _find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of the tokens to take, left to right; none overlap."""
        # Per length in bytes, the places where that is the longest token that fits. A place that turns out to lose its
        # end to a longer token gets a second chance with a shorter one.
        waiting: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        if self._start is not None:
            for match in self._start.finditer(text):
                self._offer(text, match.start(), len(text), waiting)
        found: list[tuple[int, int, int]] = []
        if not waiting:
            return found
        taken = bytearray(len(text))
        for rank in self._ranks:
            for id, start in sorted(waiting.pop(rank, ())):
                if taken[start]:
                    continue
                end = start + self._length_of(text, start, rank)
                if taken[end - 1]:
                    self._offer(text, start, end - start - 1, waiting)
                    continue
                start, end = _stripped(text, start, end, self._by_text[text[start:end]], taken)
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, id))
        return sorted(found)

    def _offer(self, text: str, start: int, longest: int, waiting: defaultdict[int, list[tuple[int, int]]]) -> None:
        """Enters the longest token of at most `longest` characters at `start`, if there is one."""
        for length in self._lengths.get(text[start : start + 2]) or self._lengths.get(text[start]) or ():
            token = self._by_text.get(text[start : start + length])
            if length <= longest and token is not None and len(token.text) == length:
                waiting[len(token.text.encode())].append((token.id, start))
                return

    def _length_of(self, text: str, start: int, rank: int) -> int:
        """Characters of the `rank` bytes that begin at `start`."""
        return len(text[start : start + rank].encode()[:rank].decode())


def _start_pattern(starts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches one character wherever a token may begin."""
    seconds: defaultdict[str, set[str]] = defaultdict(set)
    for start in starts:
        seconds[start[0]].add(start[1:])
    if not seconds:
        return None
    parts = []
    for first, following in sorted(seconds.items()):
        if "" in following:
            parts.append(re.escape(first))
        else:
            parts.append(f"{re.escape(first)}(?=[{''.join(map(re.escape, sorted(following)))}])")
    return re.compile("|".join(parts))


def _stripped(text: str, start: int, end: int, token: AddedToken, taken: bytearray) -> tuple[int, int]:
    """The token's place, widened by the white space that it drops."""
    while token.rstrip and end < len(text) and text[end] in _SPACE and not taken[end]:
        end += 1
    while token.lstrip and start > 0 and text[start - 1] in _SPACE and not taken[start - 1]:
        start -= 1
    return start, end
