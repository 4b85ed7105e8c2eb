"""Grammar: which tokens a request may generate next. Parsing is llguidance's; knows no schema, no text, no sampling.

A grammar follows the tokens that were generated, not the context, so preemption, recomputation and context shifts do not
touch it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Vocabulary(NamedTuple):
    """What a grammar has to know of the tokens. `special_ids` are no text: none is allowed, but for `eos_ids` at the end."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]


class Grammar:
    """Where one request is in its grammar. `error` is "" until llguidance gives up on it; nothing is allowed from then on."""

    __slots__ = ("_matcher", "error", "num_words")

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._matcher = matcher
        self.num_words = math.ceil(num_tokens / 32)
        self.error = ""

    @property
    def sleeps(self) -> bool:
        """Whether anything may come, for the time being."""
        return False

    def allowed(self, bits: NDArray[np.int32]) -> None:
        """Sets the bits (num_words,) of the tokens that may come next; none when the grammar has failed."""
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._failed():
            bits[:] = 0

    def accept(self, token_id: int) -> bool:
        """Goes past a token that was allowed. True when nothing can follow it."""
        self._matcher.consume_token(token_id)
        return not self._failed() and self._matcher.is_stopped()

    def num_valid(self, token_ids: list[int]) -> int:
        """How many of the tokens, from the first, may come next one after the other."""
        return self._matcher.validate_tokens(token_ids)

    def copy(self) -> Grammar:
        other = object.__new__(Grammar)
        other._matcher, other.num_words, other.error = self._matcher.deep_copy(), self.num_words, self.error
        return other

    def _failed(self) -> bool:
        """llguidance calls a matcher that failed stopped, and allows it the end: that would pass as an answer."""
        if self._matcher.is_error():
            self.error = f"the grammar cannot go on: {self._matcher.get_error().splitlines()[0]}"
        return bool(self.error)
