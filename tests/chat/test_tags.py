"""Tags in text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.chat.tags import held_back, split


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("", ["<a>"], 0),
        ("x<", ["<a>"], 1),
        ("x<a", ["<a>"], 2),
        ("x<ab", ["<a>"], 0),
        ("<<", ["<a>"], 1),
        ("ab", ["bc", "abd"], 2),
        ("x", [], 0),
    ],
)
def test_held_back(text: str, tags: list[str], expected: int) -> None:
    assert held_back(text, tags) == expected


def test_split() -> None:
    assert split("ab<a>cd<a>", ["<a>", "<b>"]) == ("ab", "<a>", "cd<a>")
    assert split("ab<b>cd<a>", ["<a>", "<b>"]) == ("ab", "<b>", "cd<a>")
    assert split("ab<", ["<a>"]) == ("ab", "", "<")
    assert split("ab<", ["<a>"], done=True) == ("ab<", "", "")


def test_a_tag_that_may_grow_is_held_back() -> None:
    tags = ["[C", "[CALL]"]
    assert split("x[C", tags) == ("x", "", "[C")
    assert split("x[CA", tags) == ("x", "", "[CA")
    assert split("x[CX", tags) == ("x", "[C", "X")
    assert split("x[CALL]y", tags) == ("x", "[CALL]", "y")
    assert split("x[CA", tags, done=True) == ("x", "[C", "A")


@given(st.text("<>ab/", max_size=30), st.lists(st.text("<>ab/", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_pieces_do_not_matter(text: str, tags: list[str], data: st.DataObject) -> None:
    def run(pieces: list[str]) -> list[str]:
        out, buffer = [""], ""
        for index, piece in enumerate(pieces):
            buffer, done = buffer + piece, index == len(pieces) - 1
            while True:
                before, tag, buffer = split(buffer, tags, done)
                out[-1] += before
                if not tag:
                    break
                out += [tag, ""]
        return [*out, buffer]

    cut = data.draw(st.integers(0, len(text)))
    assert run([text[:cut], text[cut:]]) == run([text]) == run([*text, ""])
    assert "".join(run([text])) == text
