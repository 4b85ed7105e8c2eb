"""Guesses from what was said before: what is found, and when it is looked for."""

from __future__ import annotations

import random
from array import array

import pytest

from ollamapy.engine.speculation_lookup import MAX_COMPARED, MAX_INDEXED, MAX_SUFFIX, Pairs, continuation
from tests.engine.test_speculation import PROMPT, looping


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, ([3, 4, 1], 2)),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 2, ([4, 9], 3)),  # the longer match: 9 1 2
        ([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 1, ([4], 2)),  # of equal ones, the latest
        ([5, 6, 5, 6, 5, 6], 5, ([5, 6, 5, 6, 5], 4)),  # a guess that runs into the end goes round
        ([3, 3, 3], 4, ([3, 3, 3, 3], 2)),
        ([1, 2, 3, 4, 9, 2], 3, ([], 0)),  # one token is no match
        ([1, 2, 3], 3, ([], 0)),
        ([1], 3, ([], 0)),
    ],
)
def test_lookup(tokens: list[int], count: int, expected: tuple[list[int], int]) -> None:
    assert continuation(array("q", tokens), count) == expected


@pytest.mark.parametrize("seed", range(20))
def test_lookup_is_what_a_plain_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(rng.choice([2, 3, 5])) for _ in range(rng.randrange(1, 60))]
    size, found = len(tokens), (0, 0)
    ends = [end for end in range(2, size) if tokens[end - 2 : end] == tokens[-2:]][-MAX_COMPARED:]
    for end in ends:
        length = max(n for n in range(2, min(end, MAX_SUFFIX) + 1) if tokens[end - n : end] == tokens[size - n :])
        found = max(found, (length, end))
    expected = (tokens[found[1] :] * 8)[:8] if found[0] else []
    assert continuation(array("q", tokens), 8) == (expected, found[0])


@pytest.mark.parametrize("seed", range(20))
def test_pairs_recur_where_lookup_finds_something(seed: int) -> None:
    rng = random.Random(seed)
    tokens, pairs = array("q", [0]), Pairs()
    for _ in range(60):
        tokens.extend(rng.randrange(8) for _ in range(rng.randrange(1, 4)))
        assert pairs.may_recur(tokens) == bool(continuation(tokens, 1)[0])
        if rng.random() < 0.05:  # as a context shift
            del tokens[2 : len(tokens) // 2]
            pairs.may_recur(tokens)


def test_pairs_of_long_contexts_are_left_to_lookup() -> None:
    assert Pairs().may_recur(array("q", range(MAX_INDEXED + 1)))


def test_mirostat_is_not_guessed_for() -> None:
    """Its state needs the token before."""
    run = looping()
    answer = run.one(PROMPT, max_tokens=40, speculation="ngram", mirostat=2, temperature=0.7, seed=3)
    assert answer.finish is not None and answer.finish.drafted_tokens == 0
