"""Speculation: guesses tokens ahead, so that one step can verify several. Changes how fast an answer comes, never which.

Each row of a sequence is sampled as it would be without guesses, from its own place's random number; a guess is right when
it is what was sampled. That keeps the distribution, as rejection sampling does (Leviathan et al. 2023; a guess that is
certain of itself is accepted with the model's probability of it by both), and beyond it each single answer: what a seed
gives does not depend on guesses, batch or clock (drafter-invariant coupling, Daliri et al. 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as ListLike

import torch

from ollamapy.engine.protocol import Plan
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.engine.speculation_cost import DRAFT_MODEL, StepCost, allot, rounds
from ollamapy.engine.speculation_draft import DraftModel
from ollamapy.engine.speculation_lookup import continuation

log = logging.getLogger(__name__)

MAX_DRAFT = 8  # guessed tokens per sequence and step where the request does not say
PROBE = 64  # steps after which a draft model that did not pay is asked for one token, to see whether it does now


class Speculation:
    """The guesses of one engine. Drafting stops by itself where it does not pay."""

    def __init__(self, plan: Plan, draft: DraftModel | None = None) -> None:
        self.cost = StepCost(plan.device.partition(":")[0])
        self.draft = draft
        self._most_rows = max(plan.max_batch_tokens, plan.max_num_seqs)
        self._unasked = 0  # steps since the draft model was asked

    def propose(self, running: ListLike[Sequence]) -> None:
        """Gives each of the sequences that decode next its `draft`, mostly an empty one."""
        guessing: list[Sequence] = []
        asking: list[Sequence] = []
        num_rows = 0
        for seq in running:
            seq.draft = []
            if seq.num_uncomputed != 1 or not seq.block_tables or seq.pooling is not None:
                continue
            num_rows += 1
            mode = seq.params.speculation
            if (
                mode == "off" or seq.track.failed or _most(seq) <= 0 or seq.params.mirostat
            ):  # whose state needs the token before
                continue
            try:
                _learn(seq)
                found = mode != "draft" and _look_up(seq)
            except Exception:  # of its own data, as its grammar: nobody is held up for a guess
                log.exception("request %d: guessing failed: going on without it", seq.request_id)
                seq.track.failed = True
                continue
            if self.draft is not None and mode != "ngram" and seq.track.rates[DRAFT_MODEL] >= found * seq.track.rate:
                asking.append(seq)
            elif found:
                guessing.append(seq)
        if self.draft is not None:
            self.draft.follow_only(running)
            guessing += self._ask(self.draft, asking, num_rows)
        if guessing:
            tracks = [seq.track for seq in guessing]
            lengths = [len(track.guess) for track in tracks]
            counts = allot([track.rate for track in tracks], lengths, num_rows, self._most_rows, self.cost)
            for seq, count in zip(guessing, counts, strict=True):
                seq.draft = seq.track.guess[:count]

    def observe(self, step: Schedule, seconds: float) -> None:
        """Learns what rows cost, from a step that did nothing but decode."""
        rows = [count - len(seq.draft) for seq, count in zip(step.sequences, step.num_tokens, strict=True)]
        if all(count == 1 for count in rows):
            self.cost.observe(sum(step.num_tokens), seconds)

    def check(self) -> list[str]:
        """What is wrong with the books of the draft model's blocks."""
        return [] if self.draft is None else [f"draft: {text}" for text in self.draft.blocks.check(self.draft.shadows)]

    def _ask(self, draft: DraftModel, asking: list[Sequence], num_rows: int) -> list[Sequence]:
        """Opens guesses of the draft model. One that fails is done without from then on."""
        if not asking:
            return []
        most = [_most(seq) for seq in asking]
        rates = [seq.track.rates[DRAFT_MODEL] for seq in asking]
        count = rounds(rates, most, num_rows, self.cost, draft.round_seconds)
        self._unasked += 1
        if not count and self._unasked >= PROBE:
            count = 1
        if not count:
            return [seq for seq in asking if seq.track.guess]  # found by lookup
        self._unasked = 0
        try:
            guesses = draft.guess(asking, [min(count, own) for own in most])
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("the draft model failed: going on without it")
            self.draft = None
            return []
        for seq, guess in zip(asking, guesses, strict=True):
            if guess:
                seq.track.open(guess, DRAFT_MODEL, seq.num_generated)
        return [seq for seq in asking if seq.track.guess]


def _most(seq: Sequence) -> int:
    """Tokens that may be guessed: with all of them and the one that follows, the request is at its end at the most."""
    return min(seq.params.num_draft or MAX_DRAFT, seq.max_tokens - seq.num_generated - 1, seq.num_free_places - 1)


def _learn(seq: Sequence) -> None:
    """Closes the guess that is open, once there is anything to compare it with."""
    came = seq.num_generated - seq.track.place
    if seq.track.guess and 0 < came < len(seq.token_ids):
        seq.track.close(seq.token_ids[-came:])


def _look_up(seq: Sequence) -> bool:
    """Opens a guess from the request's own tokens; whether there is one."""
    if not seq.track.pairs.may_recur(seq.token_ids):
        seq.track.guess = []
        return False
    guess, matched = continuation(seq.token_ids, _most(seq))
    stop = next((place for place, token in enumerate(guess) if token in seq.params.stop_ids), len(guess))
    guess = guess[:stop]
    if guess and seq.grammar is not None:
        guess = guess[: seq.grammar.num_valid(guess)]
    seq.track.open(guess, seq.track.bucket_of(matched), seq.num_generated)
    return bool(guess)


def agreed(draft: ListLike[int], results: list[Result]) -> list[Result]:
    """The results of a sequence's rows that hold: up to the first that is not what the next row took for granted."""
    for place, guessed in enumerate(draft[: max(len(results) - 1, 0)]):
        if results[place].error or results[place].token_id != guessed:
            return results[: place + 1]
    return results
