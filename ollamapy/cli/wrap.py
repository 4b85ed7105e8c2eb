"""Word wrap for text that arrives in pieces: a word that crosses the edge is taken back and moved to the next line."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

TAB = 8  # columns


def display_width(text: str) -> int:
    """Terminal columns: two for wide East Asian characters, none for combining marks and format characters."""
    return sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Wrapper:
    """Writes streamed text to a terminal of `width` columns; width 0 leaves lines alone."""

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._word = ""  # the unfinished word that already stands on the screen

    def feed(self, text: str) -> None:
        """Writes once per call: a terminal shows a moved word without flicker."""
        if self._width <= 0:
            self._write(text)
        else:
            self._write("".join(map(self._put, text)))

    def _put(self, character: str) -> str:
        if character == "\n":
            return self._new_line()
        width = TAB - self._column % TAB if character == "\t" else _width(character)
        moved = self._break(character) if width and self._column + width > self._width else ""
        if moved and character.isspace():
            return moved  # the line's end takes the blank's place
        self._column += width
        # A wide character is a word by itself: text without spaces may break anywhere.
        self._word = "" if character.isspace() or width > 1 else self._word + character
        return moved + character

    def _break(self, character: str) -> str:
        word, taken = self._word, display_width(self._word)
        if character.isspace() or _width(character) > 1 or not word or taken >= self._width:
            return self._new_line()
        self._column = taken
        return f"\x1b[{taken}D\x1b[K\n{word}"

    def _new_line(self) -> str:
        self._column, self._word = 0, ""
        return "\n"
