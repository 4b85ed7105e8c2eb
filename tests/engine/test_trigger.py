"""A grammar that sleeps: nothing changes before its marker, all is held behind it, and it sleeps again at its end."""

from __future__ import annotations

import json
import re

import pytest

from ollamapy.engine.grammar import Grammar
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.protocol import Trigger
from tests.engine.fake import alone
from tests.engine.test_grammar import EOS, SHADOW, TOKENS, engine, lark, vocabulary

CALL = lark('start: "[" /[a-c]{2,3}/ "]"')
ID = {token: id for id, token in reversed(list(enumerate(TOKENS))) if token}


def begin(trigger: Trigger) -> Grammar:
    return Grammars(vocabulary).start(CALL, trigger).result()


def feed(grammar: Grammar, said: str) -> None:
    for character in said:
        assert not grammar.accept(ID[character.encode()]), "a sleeping grammar ends no answer"


def test_it_sleeps_again_when_it_has_ended() -> None:
    grammar = begin(Trigger(text="tt"))
    for _ in range(3):
        feed(grammar, "at")
        assert grammar.sleeps
        feed(grammar, "t")
        assert not grammar.sleeps and grammar.num_valid([ID[b"a"]]) == 0 and grammar.num_valid([ID[b"["], ID[b"a"]]) == 2
        feed(grammar, "[ab")
        assert grammar.num_valid([ID[b"]"], ID[b"z"], ID[b"z"]]) == 3, "anything, behind its end"
        copy = grammar.copy()
        feed(copy, "]")
        assert copy.sleeps and not grammar.sleeps
        feed(grammar, "c]")
        assert grammar.sleeps and not grammar.error


def test_a_token_that_goes_on_behind_the_marker() -> None:
    fits, other = begin(Trigger(text="x")), begin(Trigger(text="ye"))
    feed(fits, "x")
    assert not fits.sleeps
    other.accept(ID[b"yes"])
    assert other.sleeps, "that begins no call: it was text"
    inside = Grammars(vocabulary).start(lark('start: "s" "a"'), Trigger(text="ye")).result()
    inside.accept(ID[b"yes"])
    assert not inside.sleeps and inside.num_valid([ID[b"a"]]) == 1 and inside.num_valid([ID[b"s"]]) == 0


def test_thinking_is_not_looked_at() -> None:
    trigger = Trigger(text="tt", thinking=("yes", "no"))
    grammar = begin(trigger)
    feed(grammar, "  yestt no tt")
    assert not grammar.sleeps
    grammar = begin(trigger)
    feed(grammar, "yestttt")
    assert grammar.sleeps
    grammar = begin(trigger)
    feed(grammar, "ytt")
    assert not grammar.sleeps, "nothing but an answer that begins with the tag is thinking"
    grammar = begin(Trigger(token_id=ID[b"t"], thinking=("yes", "no"), in_thinking=True))
    feed(grammar, "tt")
    assert grammar.sleeps
    feed(grammar, "not")
    assert not grammar.sleeps


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_only_what_is_behind_the_marker_changes(speculation: str) -> None:
    """The free answer up to the first marker, bit for bit; then a call; then free again, until the next marker."""
    calls = 0
    for seed in range(12):
        params = {"temperature": 1.0, "seed": seed, "max_tokens": 60, "stop_ids": (SHADOW, EOS), "logprobs": 1}
        prompt = [seed, 2, 3]
        free = alone(prompt, **params)
        marker = free.tokens[len(free.tokens) // 3] if len(free.tokens) > 9 else -1
        run = engine()
        held = run.one(prompt, grammar=CALL, trigger=Trigger(token_id=marker), speculation=speculation, **params)
        if marker < 0:
            assert held.tokens == free.tokens
            continue
        at = free.tokens.index(marker) + 1
        assert held.tokens[:at] == free.tokens[:at] and held.logprobs[:at] == free.logprobs[:at]
        behind = b"".join(TOKENS[id] for id in held.tokens[at:] if id < len(TOKENS))
        if len(held.tokens) > at + 5:
            assert re.match(rb"\[[a-c]{2,3}\]", behind), behind
            calls += 1
    assert calls > 4


def test_a_marker_that_does_not_come_costs_nothing() -> None:
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "stop_ids": (SHADOW, EOS), "logprobs": 1}
    free = alone([7, 7], **params)
    held = engine().one([7, 7], grammar=CALL, trigger=Trigger(text=json.dumps("never")), **params)
    assert (held.tokens, held.logprobs) == (free.tokens, free.logprobs)
