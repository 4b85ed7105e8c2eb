"""Scheduler: which tokens the next step computes, and what becomes of sequences after it. Knows no tensors and no model.

Continuous batching under a token budget. Decoding sequences come first, then the prompts of running sequences in chunks, then
waiting ones. `running` and `waiting` are both in order of arrival and every running sequence is older than every waiting one.
When blocks run out the youngest running sequence gives its own back and waits; what it has computed is computed again, unless
the prefix cache still has it. One sequence alone always fits (Engine sees to that), so the oldest always moves on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from ollamapy.engine.blocks import BlockManager, Hit
from ollamapy.engine.protocol import Embedding, Finish, FinishReason, Output, Plan
from ollamapy.engine.sequence import Result, Sequence


@dataclass(slots=True)
class Schedule:
    """One step: `num_tokens[i]` tokens of `sequences[i]` after those it has computed, the tokens of its draft at the end."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sequences)

    def parts(self) -> Iterator[Schedule]:
        """The same work, one sequence at a time."""
        return (Schedule([seq], [count]) for seq, count in zip(self.sequences, self.num_tokens, strict=True))


class Scheduler:
    """`whole_prompts`: prompts are not cut into chunks nor reused, as models that attend both ways require."""

    def __init__(self, plan: Plan, whole_prompts: bool = False) -> None:
        self.whole_prompts = whole_prompts
        self.max_num_seqs = plan.max_num_seqs
        self.max_batch_tokens = max(plan.max_batch_tokens, plan.max_num_seqs)  # all that decode fit into one step
        windows = [group.window for group in plan.groups] or [0]
        reuse = plan.prefix_cache and not whole_prompts
        self.blocks = BlockManager(plan.num_blocks, plan.block_size, reuse, windows, self.max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.sequences: dict[int, Sequence] = {}  # by request id
        self.num_preemptions = 0
        self.num_drafts = self.num_drafted = self.num_accepted = 0  # guesses, their tokens, and those that came true
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.sequences[seq.request_id] = seq
        self.waiting.append(seq)

    def abort(self, request_id: int) -> Sequence | None:
        """Ends a request at once, its blocks with it. None when there is no such request (any more)."""
        seq = self.sequences.get(request_id)
        if seq is not None:
            self._remove(seq)
        return seq

    # --- schedule ---------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Chooses the next step's tokens and gives their sequences the blocks for them."""
        step = Schedule()
        preemptions = self.num_preemptions
        self._schedule_decodes(step)
        budget = self.max_batch_tokens - sum(step.num_tokens)
        if len(step) < len(self.running):
            budget = self._schedule_prefills(step, budget)
        if self.waiting and preemptions == self.num_preemptions:
            self._admit(step, budget)
        return step

    def _schedule_decodes(self, step: Schedule) -> None:
        index = 0
        while index < len(self.running):  # grows shorter from its end while sequences are preempted
            seq = self.running[index]
            index += 1
            if len(seq.token_ids) - seq.num_computed != 1 or not seq.block_tables:
                continue
            drafted = len(seq.draft)
            if not drafted or not self.blocks.grow(seq, len(seq.token_ids) + drafted):
                drafted = 0  # nobody is put back for a guess
            while not self.blocks.grow(seq, len(seq.token_ids)):
                if self._preempt_youngest() is seq:
                    return
            step.sequences.append(seq)
            step.num_tokens.append(1 + drafted)

    def _schedule_prefills(self, step: Schedule, budget: int) -> int:
        """Next chunks of running sequences. None that decode in this step lose their blocks to it. Returns the budget left."""
        scheduled = set(step.sequences)
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            index += 1
            if seq in scheduled:
                continue
            if not seq.block_tables:
                self.blocks.share(seq, self._lookup(seq))
            count = self._chunk(seq, budget, step)
            while count and not self.blocks.grow(seq, seq.num_computed + count):
                if self.running[-1] in scheduled or self.running[-1] is seq:
                    count = 0 if self.whole_prompts else self.blocks.room(seq)
                else:
                    self._preempt_youngest()
            if count:
                scheduled.add(seq)
                step.sequences.append(seq)
                step.num_tokens.append(count)
                budget -= count
        return budget

    def _admit(self, step: Schedule, budget: int) -> None:
        """Waiting sequences whose whole context fits beside what running prompts still need and a block for each running one,
        so that a sequence is not let in only to be preempted at the next block boundary."""
        blocks = self.blocks
        promised = sum(blocks.needed(seq) for seq in self.running)
        now = 0
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            found = self._lookup(seq)
            needed = blocks.needed(seq, found)
            reserved = promised + len(self.running) * len(blocks.windows) if self.running else 0
            if needed + reserved > blocks.num_available - blocks.num_unreferenced(found):
                return
            count = self._chunk(seq, budget, step, found.num_blocks * blocks.block_size)
            if not count:
                return
            self.waiting.popleft()
            self.running.append(seq)
            blocks.share(seq, found)
            if not seq.first_scheduled_ns:
                now = now or time.monotonic_ns()
                self._first_time(seq, now)
            fits = blocks.grow(seq, seq.num_computed + count)
            assert fits
            promised += blocks.needed(seq)
            step.sequences.append(seq)
            step.num_tokens.append(count)
            budget -= count

    def _lookup(self, seq: Sequence) -> Hit:
        """Reusable blocks. A mean or first-token embedding and logprobs of a prompt need its hidden states: they reuse none."""
        return self.blocks.lookup(seq, reuse=seq.pooling in (None, "last") and not seq.tells_prompt)

    def _first_time(self, seq: Sequence, now: int) -> None:
        seq.first_scheduled_ns = now
        seq.num_cached = seq.num_computed
        self.prefix_query_tokens += seq.num_prompt_tokens
        self.prefix_hit_tokens += seq.num_cached

    def _chunk(self, seq: Sequence, budget: int, step: Schedule, computed: int | None = None) -> int:
        """Tokens of a prompt to compute now; a whole prompt may pass the budget when it has the step to itself."""
        left = len(seq.token_ids) - (seq.num_computed if computed is None else computed)
        if self.whole_prompts:
            return left if left <= budget or not len(step) else 0
        return min(left, budget)

    def _preempt_youngest(self) -> Sequence:
        seq = self.running.pop()
        self.blocks.release(seq)
        seq.pooled = None
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        return seq

    # --- commit -----------------------------------------------------------------------------------------------

    def commit(self, step: Schedule, results: list[list[Result]]) -> list[Output | Embedding]:
        """Moves the sequences of a step on by its results: none where the prompt is not complete, several where a draft
        came true."""
        now = time.monotonic_ns()
        told: list[Output | Embedding] = []
        for seq, count, found in zip(step.sequences, step.num_tokens, results, strict=True):
            if found and found[0].error:
                told.append(self._fail(seq, found[0].error, now))
                continue
            drafted = max(seq.num_computed + count - len(seq.token_ids), 0)
            seq.num_computed += count - drafted
            self.blocks.register(seq)
            logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
            seq.num_told += len(logprobs)
            if not found:
                if logprobs:
                    told.append(Output(seq.request_id, [], prompt_logprobs=logprobs))
            elif seq.pooling is not None:
                self._remove(seq)
                told.append(Embedding(seq.request_id, found[0].vector, seq.num_prompt_tokens))
            elif drafted:
                told.append(self._accept_drafted(seq, found, drafted, now))
            else:
                output = self._accept(seq, found[0], now)
                told.append(msgspec.structs.replace(output, prompt_logprobs=logprobs) if logprobs else output)
        return told

    def _accept_drafted(self, seq: Sequence, found: list[Result], drafted: int, now: int) -> Output:
        """Several tokens of one step, as if each had come by a step of its own; the blocks of wrong guesses come back."""
        told: list[Output] = []
        seq.num_drafted += drafted
        self.num_drafts += 1
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
        return Output(seq.request_id, tokens, [entry for output in told for entry in output.logprobs], told[-1].finish)

    def _accept(self, seq: Sequence, result: Result, now: int) -> Output:
        if not seq.first_token_ns:
            seq.first_token_ns = now
        seq.last_token_ns = now
        if seq.max_tokens == 0:  # only the prompt was wanted, in the cache
            self._remove(seq)
            return Output(seq.request_id, [], finish=finish(seq, "length", now))
        reason = seq.accept(result.token_id)
        ended = None
        if reason is not None:
            self._remove(seq)
            ended = finish(seq, reason, now)
        elif seq.is_full:
            self.blocks.release(seq)
            seq.shift()
        if result.token_id in seq.params.stop_ids:
            return Output(seq.request_id, [], finish=ended)
        logprobs = [] if result.logprob is None else [result.logprob]
        return Output(seq.request_id, [result.token_id], logprobs, ended)

    def _fail(self, seq: Sequence, error: str, now: int) -> Output | Embedding:
        if seq.pooling is None:
            return self._fail_generation(seq, error, now)
        self._remove(seq, forget=True)
        return Embedding(seq.request_id, b"", seq.num_prompt_tokens, error)

    def _fail_generation(self, seq: Sequence, error: str, now: int) -> Output:
        self._remove(seq, forget=True)
        ended = finish(seq, "error", now, error)
        ended = msgspec.structs.replace(ended, bad_request=seq.grammar is not None and error == seq.grammar.error)
        return Output(seq.request_id, [], finish=ended)

    def _remove(self, seq: Sequence, forget: bool = False) -> None:
        del self.sequences[seq.request_id]
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.blocks.release(seq, forget)

    def check(self) -> list[str]:
        """What is wrong with the books; empty when nothing is."""
        problems = self.blocks.check([*self.running, *self.waiting])
        if len(self.running) + len(self.waiting) != len(self.sequences):
            problems.append("a sequence is lost")
        for seq in self.sequences.values():
            if seq.num_blocks * self.blocks.block_size < seq.num_computed:
                problems.append(f"request {seq.request_id} has {seq.num_computed} tokens in {seq.num_blocks} blocks")
        return problems


def finish(seq: Sequence, reason: FinishReason, now: int, error: str = "") -> Finish:
    scheduled, first = seq.first_scheduled_ns or now, seq.first_token_ns or now
    return Finish(
        reason=reason,
        prompt_tokens=seq.num_prompt_tokens,
        cached_tokens=seq.num_cached,
        completion_tokens=seq.num_generated,
        prompt_ns=first - scheduled,
        decode_ns=max(seq.last_token_ns - first, 0),
        queue_ns=scheduled - seq.arrival_ns,
        num_shifts=seq.num_shifts,
        drafted_tokens=seq.num_drafted,
        accepted_tokens=seq.num_accepted,
        error=error,
    )
