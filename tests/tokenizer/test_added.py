"""Added tokens against the rule spelled out: every token in order of length, each over all the text that is left."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from ollamapy.tokenizer.added import AddedToken, AddedTokens

SPACE = " \t\n\v\f\r"


def slow_split(tokens: list[AddedToken], text: str) -> list[str | int]:
    parts: list[str | int] = [text]
    for token in sorted(tokens, key=lambda token: (-len(token.text.encode()), token.id)):
        left: list[str | int] = []
        for part in parts:
            while isinstance(part, str) and (at := part.find(token.text)) >= 0:
                left += [part[:at].rstrip(SPACE) if token.lstrip else part[:at], token.id]
                part = part[at + len(token.text) :]
                part = part.lstrip(SPACE) if token.rstrip else part
            left.append(part)
        parts = left
    return [part for part in parts if part != ""]


ALPHABET = st.sampled_from("ab é \n｜")
TEXTS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), unique=True, max_size=8)


@given(TEXTS, st.text(ALPHABET, max_size=40), st.booleans(), st.booleans())
def test_longest_first(texts: list[str], text: str, lstrip: bool, rstrip: bool) -> None:
    tokens = [AddedToken(t, id, lstrip, rstrip and id % 2 == 0) for id, t in enumerate(texts)]
    assert list(AddedTokens(tokens).split(text)) == slow_split(tokens, text)


def test_a_longer_token_wins_over_an_earlier_one() -> None:
    tokens = AddedTokens([AddedToken("ab", 1), AddedToken("bcd", 2), AddedToken("cd", 3)])
    assert list(tokens.split("abcd ab")) == ["a", 2, " ", 1]


def test_a_shorter_token_takes_over_where_the_longest_loses_its_end() -> None:
    tokens = AddedTokens([AddedToken("abc", 1), AddedToken("cdef", 2), AddedToken("ab", 3)])
    assert list(tokens.split("abcdef")) == [3, 2]


def test_none() -> None:
    assert list(AddedTokens([]).split("text")) == ["text"]
    assert list(AddedTokens([AddedToken("", 1), AddedToken("x", 2)]).split("")) == []


def test_many_tokens_cost_little() -> None:
    """6,241 tokens as Gemma has, on a text with a begin of one at every third character: 0.2 s, not minutes."""
    tokens = AddedTokens(
        [AddedToken(f"<unused{n}>", n) for n in range(6241)] + [AddedToken(" " * n, 9000 + n) for n in range(2, 32)]
    )
    started = time.perf_counter()
    assert len(list(tokens.split("<u " * 50_000))) == 1
    assert list(tokens.split(" " * 3100)) == [9031] * 100
    assert len(list(tokens.split(" " * 100_000))) == 3226
    assert time.perf_counter() - started < 5
