"""Scheduler: which tokens the next step computes, and what becomes of sequences after it. Knows no tensors and no model.

Continuous batching under a token budget. Waiting sequences are let in by fair share (`fairness`), while their context has room;
those that decode come first in a step, then prompts in chunks, of which `pace` says how much is bearable beside them.
`running` is in order of arrival. When blocks run out a sequence of the client that runs the most gives its own back and waits;
what it has computed is computed again, unless the prefix cache still has it. The oldest is never chosen for that, and one
sequence alone always fits (Engine sees to that), so the oldest always moves on.
"""

from __future__ import annotations

import logging
import time
from bisect import insort

import msgspec

from ollamapy.engine.blocks import BlockManager, Hit
from ollamapy.engine.fairness import PROMPT_COST, TOKEN_COST, Queue, Shares, age, in_turn, overserved, victim, yielding
from ollamapy.engine.pace import SHORT, Pace
from ollamapy.engine.protocol import Embedding, Output, Plan
from ollamapy.engine.schedule import Schedule, embedding, finish
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.engine.siblings import Siblings
from ollamapy.errors import failure_text

log = logging.getLogger(__name__)

OLDEST_SHARE = 4  # of the prompt tokens of a step, one part in so many is kept for the oldest prompt


class Scheduler:
    """`whole_prompts`: prompts are not cut into chunks nor reused, as models that attend both ways require.
    `key`: of the hashes of prefixes, where they are kept beyond this process."""

    def __init__(self, plan: Plan, whole_prompts: bool = False, key: bytes = b"") -> None:
        self.whole_prompts = whole_prompts
        self.max_num_seqs = plan.max_num_seqs
        most = max(plan.max_batch_tokens, plan.max_num_seqs)  # all that decode fit into one step
        reuse, windows = plan.prefix_cache and not whole_prompts, [group.window for group in plan.groups] or [0]
        self.blocks = BlockManager(plan.num_blocks, plan.block_size, reuse, windows, most, key)
        self.pace = Pace(most, plan.slowdown)
        self.shares = Shares()
        self.waiting = Queue(self.shares)
        self.siblings = Siblings()
        self.running: list[Sequence] = []
        self.sequences: dict[int, Sequence] = {}  # by request id
        self.num_preemptions = 0
        self.num_drafts = self.num_drafted = self.num_accepted = 0  # guesses, their tokens, and those that came true
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.sequences[seq.request_id] = seq
        self.shares.arrive(seq.caller.client)
        seq.start = self.shares.served(seq)
        shares = self.blocks.prefix_cache and seq.pooling is None and not seq.tells_prompt
        if not (shares and self.siblings.arrive(seq)):
            self.waiting.add(seq)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.siblings.num_held

    def abort(self, request_id: int) -> Sequence | None:
        """Ends a request at once, its blocks with it. None when there is no such request (any more)."""
        seq = self.sequences.get(request_id)
        if seq is not None:
            self._remove(seq)
        return seq

    # --- schedule ---------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Chooses the next step's tokens and gives their sequences the blocks for them."""
        now = time.monotonic_ns()
        if self.waiting:
            self._admit(now)
        step = Schedule()
        self._schedule_decodes(step, now)
        if len(step) < len(self.running):
            self._schedule_prefills(step, now)
        step.copies, self.blocks.copies = self.blocks.copies, []
        return step

    def _admit(self, now: int) -> None:
        """Lets waiting sequences in, each as soon as there is room for its whole context."""
        while self.waiting:
            seq = self.waiting.next(now)
            while not self._has_room(seq, found := self._lookup(seq)):  # whose blocks may be those of one put back
                other = overserved(seq, self.running, now)
                if other is None:
                    return
                self._preempt(other)
            self.waiting.remove(seq)
            insort(self.running, seq, key=age)
            self._reuse(seq, found)

    def _has_room(self, seq: Sequence, found: Hit) -> bool:
        """A seat, and blocks beside what running prompts still need and one for each running sequence, so that none is let in
        only to be preempted at the next block boundary. `found`: blocks that it reuses."""
        if len(self.running) == self.max_num_seqs:
            return False
        blocks = self.blocks
        promised = sum(blocks.needed(each) + len(blocks.windows) for each in self.running)
        return blocks.needed(seq, found) + promised <= blocks.num_available - blocks.num_unreferenced(found)

    def _schedule_decodes(self, step: Schedule, now: int) -> None:
        decoding = [seq for seq in self.running if seq.num_uncomputed == 1 and seq.block_tables and seq.first_scheduled_ns]
        preempted: set[Sequence] = set()
        counts: dict[Sequence, int] = {}
        for seq in decoding:
            drafted = len(seq.draft)
            if seq in preempted or not drafted or not self.blocks.grow(seq, len(seq.token_ids) + drafted):
                drafted = 0  # nobody is put back for a guess
            while seq not in preempted and not self.blocks.grow(seq, len(seq.token_ids)):
                other = victim(self.running, self.running, now)
                preempted.add(other)
                self._preempt(other)
            counts[seq] = 1 + drafted
        step.sequences = [seq for seq in decoding if seq not in preempted]
        step.num_tokens = [counts[seq] for seq in step.sequences]
        step.num_decodes = len(step)

    def _schedule_prefills(self, step: Schedule, now: int) -> None:
        """Next chunks of prompts, in the order of `in_turn` and with a part of the budget for the oldest whatever its
        length. Prompts that begin and end in this step have a larger budget, `whole`. None that decode in this step lose their
        blocks to it."""
        rows, crowd = sum(step.num_tokens), (len(self.running) - len(step) - 1) / max(len(step), 1)
        budget, whole = self.pace.budget(rows, crowd=crowd), self.pace.budget(rows, SHORT, crowd)
        scheduled, preempted = set(step.sequences), set[Sequence]()
        prompts = [seq for seq in self.running if seq not in scheduled]
        oldest = prompts[0]
        kept = min(oldest.num_uncomputed, -(-budget // OLDEST_SHARE))
        for seq in in_turn(prompts, self.shares, now):
            if seq is oldest:
                budget, kept = max(budget, kept), 0  # short ones may have taken more than all of it
            if whole - kept <= 0 or seq in preempted:
                continue
            if seq.num_uncomputed > 1 and not (seq.block_tables and seq.first_scheduled_ns):
                self._reuse(seq, self._lookup(seq))
            short = not seq.first_scheduled_ns and seq.num_uncomputed <= whole - kept
            count = min(seq.num_uncomputed, whole - kept if short else max(budget - kept, 0))
            if self.whole_prompts and count < seq.num_uncomputed:  # one may pass the budget when it has the step to itself
                count = 0 if len(step) else seq.num_uncomputed
            while count and not self.blocks.grow(seq, seq.num_computed + count):
                younger = yielding(seq, self.running, scheduled, now)
                if younger:
                    other = victim(younger, self.running, now)
                    preempted.add(other)
                    self._preempt(other)
                else:
                    count = 0 if self.whole_prompts else self.blocks.room(seq)
            if count:
                seq.draft = []  # one that is all but computed already was guessed for
                self._first_time(seq, now)
                scheduled.add(seq)
                step.sequences.append(seq)
                step.num_tokens.append(count)
                budget, whole = budget - count, whole - count

    def _lookup(self, seq: Sequence) -> Hit:
        """Reusable blocks. A mean or first-token embedding and logprobs of a prompt need its hidden states: they reuse none."""
        found = self.blocks.lookup(seq, reuse=seq.pooling in (None, "last") and not seq.tells_prompt)
        return self.siblings.extended(seq, found, self.blocks.block_size)

    def _reuse(self, seq: Sequence, found: Hit) -> None:
        """Again when its first chunk comes: others may have computed more of its prompt since it was let in."""
        self.blocks.release(seq)
        self.blocks.share(seq, found)

    def _first_time(self, seq: Sequence, now: int) -> None:
        if seq.first_scheduled_ns:
            return
        seq.first_scheduled_ns = now
        seq.num_cached = seq.num_computed
        self.prefix_query_tokens += seq.num_prompt_tokens
        self.prefix_hit_tokens += seq.num_cached

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.release(seq)
        seq.pooled, seq.draft = None, []
        self.waiting.add(seq)
        self.num_preemptions += 1

    # --- commit -----------------------------------------------------------------------------------------------

    def commit(self, step: Schedule, results: list[list[Result]]) -> list[Output | Embedding]:
        """Moves the sequences of a step on by its results: none where the prompt is not complete, several where a draft
        came true."""
        now = time.monotonic_ns()
        told: list[Output | Embedding] = []
        for index, (seq, count, found) in enumerate(zip(step.sequences, step.num_tokens, results, strict=True)):
            self.shares.charge(seq, TOKEN_COST * max(1, len(found)) if index < step.num_decodes else PROMPT_COST * count)
            if found and found[0].error:
                told.append(self._fail(seq, found[0].error, now))
                continue
            drafted = max(seq.num_computed + count - len(seq.token_ids), 0)
            seq.num_computed += count - drafted
            self.blocks.register(seq)
            for other in self.siblings.computed(seq):
                self.waiting.add(other)
            logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
            seq.num_told += len(logprobs)
            if not found:
                if logprobs:
                    told.append(Output(seq.request_id, [], prompt_logprobs=logprobs))
            elif seq.pooling is not None:
                self._remove(seq)
                told.append(embedding(seq, found[0].vector))
            elif drafted:
                told.append(self._accept_drafted(seq, found, drafted, now))
            else:
                output = self._accept(seq, found[0], now)
                told.append(msgspec.structs.replace(output, prompt_logprobs=logprobs) if logprobs else output)
        return told

    def _accept_drafted(self, seq: Sequence, found: list[Result], drafted: int, now: int) -> Output:
        """Several tokens of one step, as if each had come by a step of its own; the blocks of wrong guesses come back."""
        told: list[Output] = []
        seq.num_drafted, self.num_drafts = seq.num_drafted + drafted, self.num_drafts + 1
        self.num_drafted += drafted
        for place, result in enumerate(found):
            if place:
                seq.num_computed += 1
                seq.num_accepted += 1
                self.num_accepted += 1
                self.blocks.register(seq)
            told.append(self._fail_generation(seq, result.error, now) if result.error else self._accept(seq, result, now))
            if told[-1].finish is not None:
                break
        else:
            self.blocks.trim(seq, len(seq.token_ids))
        tokens = [token for output in told for token in output.token_ids]
        logprobs, drafts = [entry for output in told for entry in output.logprobs], (seq.num_drafted, seq.num_accepted)
        return Output(seq.request_id, tokens, logprobs, told[-1].finish, drafts=drafts, num_shifts=seq.num_shifts)

    def _accept(self, seq: Sequence, result: Result, now: int) -> Output:
        queued = cached = 0
        if not seq.first_token_ns:
            seq.first_token_ns, queued, cached = now, seq.first_scheduled_ns - seq.arrival_ns, seq.num_cached
        seq.last_token_ns = now
        if seq.max_tokens == 0:  # only the prompt was wanted, in the cache
            self._remove(seq)
            return Output(seq.request_id, [], finish=finish(seq, "length", now))
        try:
            reason = seq.accept(result.token_id)
        except Exception as error:  # of its own data, as its grammar: the others go on
            log.exception("request %d failed", seq.request_id)
            return self._fail_generation(seq, failure_text(error), now)
        ended = None
        if reason is not None:
            self._remove(seq)
            ended = finish(seq, reason, now)
        elif seq.is_full:
            self.blocks.release(seq)
            self.siblings.leave(seq)
            seq.shift()
        if result.token_id in seq.params.stop_ids:
            return Output(seq.request_id, [], finish=ended, cached_tokens=cached)
        logprobs = [] if result.logprob is None else [result.logprob]
        told = Output(seq.request_id, [result.token_id], logprobs, ended, queue_ns=queued, cached_tokens=cached)
        return msgspec.structs.replace(told, num_shifts=seq.num_shifts) if seq.num_shifts else told

    def _fail(self, seq: Sequence, error: str, now: int) -> Output | Embedding:
        if seq.pooling is None:
            return self._fail_generation(seq, error, now)
        self._remove(seq, forget=True)
        return Embedding(seq.request_id, b"", seq.num_prompt_tokens, error)

    def _fail_generation(self, seq: Sequence, error: str, now: int) -> Output:
        self._remove(seq, forget=True)
        own_fault = seq.grammar is not None and error == seq.grammar.error
        return Output(seq.request_id, [], finish=finish(seq, "error", now, error, bad_request=own_fault))

    def _remove(self, seq: Sequence, forget: bool = False) -> None:
        del self.sequences[seq.request_id]
        if seq in self.running:
            self.running.remove(seq)
        elif not self.siblings.is_held(seq):
            self.waiting.remove(seq)
        if (heir := self.siblings.leave(seq)) is not None:
            self.waiting.add(heir)
        self.shares.leave(seq.caller.client)
        self.blocks.release(seq, forget)

    def check(self) -> list[str]:
        """What is wrong with the books; empty when nothing is."""
        problems = self.blocks.check([*self.running, *self.waiting, *self.siblings.held])
        if len(self.running) + self.num_waiting != len(self.sequences):
            problems.append("a sequence is lost")
        for seq in self.sequences.values():
            if seq.num_blocks * self.blocks.block_size < seq.num_computed:
                problems.append(f"request {seq.request_id} has {seq.num_computed} tokens in {seq.num_blocks} blocks")
        return problems
