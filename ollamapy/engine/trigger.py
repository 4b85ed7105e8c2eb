"""Triggered: a grammar that sleeps until a token or a text was generated, and again when it has ended. Knows no tool calls.

While it sleeps nothing is forbidden and no mask is made: what is generated is, bit by bit, what it is without a grammar.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from ollamapy.engine.grammar import Grammar, Vocabulary
from ollamapy.engine.protocol import Trigger

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_TAIL = 1024  # bytes that are kept of the text: a marker and one token are much less


class _State(Enum):
    BEGUN = auto()  # nothing but spaces yet: thinking may begin
    THINKING = auto()
    WATCHING = auto()
    HELD = auto()  # the grammar is in force


class Spelling(NamedTuple):
    """The bytes of each token, and the tokens of one byte by it: with them a grammar is told any text."""

    tokens: list[bytes]
    single: dict[int, int]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Spelling:
        special = set(vocabulary.special_ids)
        alone = {token[0]: id for id, token in enumerate(vocabulary.tokens) if len(token) == 1 and id not in special}
        return cls(vocabulary.tokens, alone)


class Triggered(Grammar):
    """`matcher` is where the grammar begins; it is copied each time that `trigger` comes."""

    __slots__ = ("_beginning", "_spelling", "_state", "_tail", "_trigger")

    def __init__(self, matcher: LLMatcher, num_tokens: int, spelling: Spelling, trigger: Trigger) -> None:
        super().__init__(matcher, num_tokens)
        self._beginning, self._spelling, self._trigger = matcher, spelling, trigger
        begun = _State.BEGUN if trigger.thinking[0] else _State.WATCHING
        self._state = _State.THINKING if trigger.in_thinking else begun
        self._tail = b""

    @property
    def sleeps(self) -> bool:
        return self._state is not _State.HELD

    def accept(self, token_id: int) -> bool:
        """False: an answer may always go on after the grammar's end."""
        if self._state is _State.HELD:
            if super().accept(token_id):
                self._state, self._tail = _State.WATCHING, b""
        else:
            self._watch(token_id)
        return False

    def num_valid(self, token_ids: list[int]) -> int:
        ahead = self.copy()
        for place, token_id in enumerate(token_ids):
            if not ahead.sleeps and not ahead._matcher.validate_tokens([token_id]):
                return place
            ahead.accept(token_id)
        return len(token_ids)

    def copy(self) -> Triggered:
        other = object.__new__(Triggered)
        for name in ("error", "num_words", *Triggered.__slots__):
            setattr(other, name, getattr(self, name))
        other._matcher = self._matcher if self.sleeps else self._matcher.deep_copy()
        return other

    def _watch(self, token_id: int) -> None:
        trigger = self._trigger
        if self._state is _State.WATCHING and token_id == trigger.token_id:
            self._begin(b"")
            return
        tokens = self._spelling.tokens
        self._tail = (self._tail + (tokens[token_id] if token_id < len(tokens) else b""))[-MAX_TAIL:]
        if self._state is _State.BEGUN:
            opening, text = trigger.thinking[0].encode(), self._tail.lstrip()
            if text.startswith(opening):
                self._state, self._tail = _State.THINKING, text[len(opening) :]
            elif not opening.startswith(text):
                self._state = _State.WATCHING
        if self._state is _State.THINKING:
            _, closing, rest = self._tail.partition(trigger.thinking[1].encode())
            if closing:
                self._state, self._tail = _State.WATCHING, rest
        if self._state is _State.WATCHING and trigger.text:
            _, marker, rest = self._tail.partition(trigger.text.encode())
            if marker:
                self._begin(rest)

    def _begin(self, rest: bytes) -> None:
        """The grammar, and in it the end of the token that completed the marker. Where that does not fit, it was no marker."""
        single = self._spelling.single
        ids = [single[byte] for byte in rest if byte in single]
        matcher = self._beginning.deep_copy()
        self._tail = rest
        if len(ids) == len(rest) and matcher.validate_tokens(ids) == len(ids):
            matcher.consume_tokens(ids)
            self._matcher, self._state = matcher, _State.HELD
