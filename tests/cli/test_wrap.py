"""Wrapped text, as a terminal shows it: replayed on a small screen that knows the three control codes used."""

from __future__ import annotations

import random
import re

import pytest

from ollamapy.cli.wrap import Wrapper, display_width


def screen(written: str) -> list[str]:
    """Lines of a terminal after `written`; it understands newline, cursor left and erase to the end of the line."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[\d+D|\x1b\[K|[^\x1b]", written):
        if part == "\n":
            lines.append("")
            column = 0
        elif part.endswith("D") and part.startswith("\x1b"):
            column -= int(part[2:-1])
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part
            column += 1
    return lines


def wrapped(text: str, width: int, sizes: list[int] | None = None) -> list[str]:
    written: list[str] = []
    wrapper = Wrapper(written.append, width)
    at = 0
    for size in sizes or [len(text)]:
        wrapper.feed(text[at : at + size])
        at += size
    return screen("".join(written))


def test_a_word_that_crosses_the_edge_moves_whole() -> None:
    assert wrapped("the quick brown fox", 10) == ["the quick ", "brown fox"]
    assert wrapped("the quicker brown", 10) == ["the ", "quicker ", "brown"]


def test_the_blank_at_the_edge_is_the_line_break() -> None:
    assert wrapped("1234567890 next", 10) == ["1234567890", "next"]


def test_a_word_longer_than_the_line_is_cut() -> None:
    assert wrapped("abcdefghijklmno", 6) == ["abcdef", "ghijkl", "mno"]
    assert wrapped("a bcdefghijk", 6) == ["a ", "bcdefg", "hijk"]


def test_newlines_and_tabs_stand() -> None:
    assert wrapped("one\n\n  two", 10) == ["one", "", "  two"]
    assert wrapped("ab\tcdefg hi", 10) == ["ab\t", "cdefg hi"]


def test_wide_and_combining_characters() -> None:
    assert display_width("日本") == 4
    assert display_width("e\u0301") == 1
    assert display_width("a\u200db") == 2
    assert wrapped("日本語です", 6) == ["日本語", "です"]


def test_no_width_leaves_the_text_alone() -> None:
    written: list[str] = []
    Wrapper(written.append, 0).feed("x" * 500 + "\x1b")
    assert written == ["x" * 500 + "\x1b"]


@pytest.mark.parametrize("width", [1, 2, 7, 20])
def test_pieces_make_no_difference(width: int) -> None:
    chance = random.Random(width)
    text = "".join(chance.choice("ab cde \nfg日é") for _ in range(400))
    whole = wrapped(text, width)
    sizes = [chance.randrange(1, 5) for _ in range(400)]
    assert wrapped(text, width, sizes) == whole
    if width > 1:
        assert all(display_width(line) <= width for line in whole)
    kept = [c for c in text if not c.isspace()]
    assert [c for line in whole for c in line if not c.isspace()] == kept
