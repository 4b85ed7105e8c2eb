"""Stop strings: the same cut however the text is cut into pieces; nothing held back longer than it must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.server.stops import StopFilter


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    filter = StopFilter(stops)
    shown = "".join(filter.feed(piece) for piece in pieces)
    shown += filter.flush()
    assert filter.passed == len(shown)
    return shown, filter.stopped


@pytest.mark.parametrize(("stops", "text", "shown"), [
    (["END"], "one END two", "one "),
    (["END"], "ENDING", ""),
    (["END"], "EN", "EN"),
    (["END"], "E E EN", "E E EN"),
    (["ab", "abc"], "xabc", "x"),
    (["abc", "b"], "xabc", "xa"),
    (["aab"], "aaab", "a"),
    (["\n\n"], "a\nb\n\nc", "a\nb"),
    (["é"], "café", "caf"),
    (["", "x"], "axb", "a"),
    ([], "anything", "anything"),
])  # fmt: skip
def test_whole_and_split_at_every_place(stops: list[str], text: str, shown: str) -> None:
    stopped = shown != text
    assert run(stops, [text]) == (shown, stopped)
    assert run(stops, list(text)) == (shown, stopped)
    for at in range(len(text)):
        assert run(stops, [text[:at], text[at:]]) == (shown, stopped)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.text("ab", max_size=5), max_size=12))
def test_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert run(stops, pieces) == run(stops, list(text)) == run(stops, [text])
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert run(stops, pieces)[1] == bool(ends)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    filter = StopFilter(["STOP"])
    assert filter.feed("abcS") == "abc"
    assert filter.feed("T") == ""
    assert filter.feed("x") == "STx"
    assert filter.feed("y") == "y"
    assert filter.feed("zSTOPw") == "z" and filter.stopped
    assert filter.feed("more") == "" and filter.flush() == ""
