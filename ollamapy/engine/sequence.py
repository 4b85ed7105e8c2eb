"""Sequence: all state of one request, from its arrival to its end. Knows no block pool, no batch and no model.

Token ids are kept in typed arrays, so that a slice of them is copied into a batch or hashed without a loop in Python.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine.batch import RowAdapter
from ollamapy.engine.grammar import Grammar
from ollamapy.engine.protocol import NOBODY, Caller, FinishReason, SamplingParams, TokenLogprob
from ollamapy.engine.speculation_cost import Track
from ollamapy.errors import ContextOverflow

Pooling = Literal["mean", "cls", "last"]
MAX_CONTEXTS = 10  # generated tokens, in context lengths, of a request that sets no limit
FINITE = tuple(field.name for field in msgspec.structs.fields(SamplingParams) if isinstance(field.default, float))


class Result(NamedTuple):
    """What a step found for one sequence: a token, an embedding or an error."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    vector: bytes = b""
    error: str = ""


class PenaltyWindow:
    """The last `length` tokens of a request, prompt included, and how often each occurs."""

    __slots__ = ("counts", "recent")

    def __init__(self, length: int, token_ids: array[int]) -> None:
        self.recent: deque[int] = deque(maxlen=length)
        self.counts: dict[int, int] = {}
        for token_id in token_ids[-length:]:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        recent, counts = self.recent, self.counts
        if len(recent) == recent.maxlen:
            oldest = recent[0]
            left = counts[oldest] - 1
            if left:
                counts[oldest] = left
            else:
                del counts[oldest]
        recent.append(token_id)
        counts[token_id] = counts.get(token_id, 0) + 1

    def copy(self) -> PenaltyWindow:
        other = object.__new__(PenaltyWindow)
        other.recent, other.counts = self.recent.copy(), self.counts.copy()
        return other


def penalty_window(params: SamplingParams, context_length: int, token_ids: array[int]) -> PenaltyWindow | None:
    """None when the penalties change nothing."""
    neutral = params.repeat_penalty == 1.0 and params.presence_penalty == 0.0 and params.frequency_penalty == 0.0
    length = context_length if params.repeat_last_n < 0 else params.repeat_last_n
    return None if neutral or length == 0 else PenaltyWindow(length, token_ids)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request. `token_ids` is its context: the prompt and what was generated, less what context shifts dropped."""

    # set by Engine when the request arrives; none of these changes later
    request_id: int
    token_ids: array[int]
    params: SamplingParams
    context_length: int  # most tokens of its context
    seed: int = 0
    pooling: Pooling | None = None  # an embedding request: how its hidden states become one vector
    arrival_ns: int = 0
    caller: Caller = NOBODY
    adapters: tuple[tuple[RowAdapter, float], ...] = ()
    grammar: Grammar | None = None  # moves on with every token generated
    salt: bytes = field(init=False)  # what keys and values depend on beside tokens, and who may share them
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)
    num_keep: int = field(init=False)  # head tokens that a context shift keeps

    # moved by Scheduler
    start: int = 0  # its client's counter (fairness) when it came
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached: int = 0  # prompt tokens found in the prefix cache when it was first scheduled
    num_generated: int = 0  # the stop id included; context shifts and preemptions do not touch it
    num_shifts: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    penalties: PenaltyWindow | None = field(init=False)
    breakers: NDArray[np.int64] | None = None  # DRY's, as an array once it was needed
    never: tuple[object, int, int] | None = None  # the `Editor` that has its ids never chosen, and where: once it was asked for
    mu: list[float] = field(init=False)  # mirostat's state before each generated token; moved by the sampler

    # moved by prompt_logprobs and, when they have been told, by Scheduler
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # not told yet
    num_told: int = 0

    # moved by BlockManager
    block_tables: list[array[int]] = field(default_factory=list)  # one per layer group, all of one length; none: no blocks
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks of token_ids, as far as needed yet
    num_registered: int = 0  # leading blocks of the tables that were offered to the prefix cache

    # moved by Speculation
    draft: list[int] = field(default_factory=list)  # tokens guessed to follow token_ids, for the next step to verify
    track: Track = field(default_factory=Track)
    num_drafted: int = 0  # moved by Scheduler: guesses that were verified, and that came true
    num_accepted: int = 0

    # moved by the pooling of embeddings
    pooled: Tensor | None = None  # (E,) float64 sum, or the one row wanted

    def __post_init__(self) -> None:
        params = self.params
        self.salt = repr((self.caller.salt, params.cache_salt, params.adapters)).encode()
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = params.max_tokens if params.max_tokens >= 0 else MAX_CONTEXTS * self.context_length
        keep = self.num_prompt_tokens if params.num_keep < 0 else params.num_keep
        self.num_keep = max(min(keep, self.context_length - 4), 0)
        self.mu = [2.0 * params.mirostat_tau]
        self.penalties = penalty_window(params, self.context_length, self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_blocks(self) -> int:
        """Length of its block tables."""
        return len(self.block_tables[0]) if self.block_tables else 0

    def accept(self, token_id: int) -> FinishReason | None:
        """Takes the token sampled after all of token_ids; why the request ends with it, if it does.

        A stop id is counted but not kept; a token that completes the grammar is.
        When the context is full and may be shifted, `is_full` is true afterwards.
        """
        params = self.params
        self.num_generated += 1
        if token_id in params.stop_ids:
            return "stop"
        self.token_ids.append(token_id)
        if self.penalties is not None:
            self.penalties.append(token_id)
        if self.grammar is not None and self.grammar.accept(token_id):
            return "stop"
        if self.num_generated >= self.max_tokens or (self.is_full and not params.shift):
            return "length"
        return None

    def num_to_tell(self, length: int) -> int:
        """Of how many of the next `length` tokens to compute the prompt's logprobs need the hidden state."""
        if not self.tells_prompt:
            return 0
        end = min(self.num_computed + length, self.num_prompt_tokens - 1)
        return max(end - max(self.num_computed, self.num_told), 0)

    @property
    def tells_prompt(self) -> bool:
        return self.params.prompt_logprobs >= 0 and self.num_told < self.num_prompt_tokens - 1

    @property
    def is_full(self) -> bool:
        """One place of the context stays free, as in llama.cpp: the newest token is shifted before it is computed."""
        return len(self.token_ids) >= self.context_length

    @property
    def num_free_places(self) -> int:
        return self.context_length - len(self.token_ids)

    def rows(self, num_draft: int) -> list[Sequence]:
        """Itself, and itself with 1, 2 ... tokens of its draft accepted, for sampling: the copies own nothing."""
        found = [self]
        for token_id in self.draft[:num_draft]:
            ahead = copy.copy(found[-1])
            ahead.token_ids = ahead.token_ids[:]
            ahead.penalties = ahead.penalties.copy() if ahead.penalties is not None else None
            ahead.grammar = ahead.grammar.copy() if ahead.grammar is not None else None
            ahead.accept(token_id)
            found.append(ahead)
        return found

    def shift(self) -> None:
        """Drops the older half of what follows the kept head; everything is to be computed again.

        The newest token is not counted, it is not in the cache yet. Terminates: after it, the context has a free place,
        or one token when its length is 1. The caller has released the blocks.
        """
        past = len(self.token_ids) - 1
        keep = min(self.num_keep, past)
        dropped = max((past - keep) // 2, 1)
        del self.token_ids[keep : keep + dropped]
        self.block_hashes.clear()
        self.num_shifts += 1


def refusal(token_ids: list[int], params: SamplingParams, context_length: int, vocab_size: int) -> str:
    """Why a request cannot be run; "" when it can."""
    if not token_ids:
        return "the prompt has no tokens"
    if len(token_ids) > context_length:
        return str(ContextOverflow(len(token_ids), context_length))
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        return f"a token id of the prompt is not in 0..{vocab_size - 1}"
    for name in FINITE:
        if not math.isfinite(getattr(params, name)):
            return f"{name} is not a finite number"
    if any(not (0 <= token_id < vocab_size and math.isfinite(bias)) for token_id, bias in params.logit_bias):
        return f"logit_bias: a token id is not in 0..{vocab_size - 1}, or a bias is not a finite number"
    if params.repeat_penalty <= 0.0:
        return f"repeat_penalty must be greater than 0, not {params.repeat_penalty}"
    return ""
