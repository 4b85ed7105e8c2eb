"""A draft model: a smaller one of the same vocabulary that says what the main one will probably say. Decides nothing.

It has its own KV caches, blocks and batches, and a shadow of each sequence that it follows. It samples as the main model
does, with the random number of the token's place, so that where both think alike they draw alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as ListLike

import msgspec

from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.build import build_batch
from ollamapy.engine.protocol import Plan
from ollamapy.engine.runner import Model, ModelRunner
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Sequence

LEARNING = 0.1


class DraftModel:
    """Guesses for some sequences together. `round_seconds`: what one more token of each costs, 0 until that was measured."""

    def __init__(self, model: Model, plan: Plan) -> None:
        own = msgspec.structs.replace(plan, num_blocks=plan.num_draft_blocks, groups=())  # those are the main model's layers
        self.runner = ModelRunner(model, own)
        self.blocks = BlockManager(own.num_blocks, own.block_size, own.prefix_cache)
        self.round_seconds = 0.0
        self._budget = max(plan.max_batch_tokens, plan.max_num_seqs)
        self._vocab_size = model.config.vocab_size
        self._sampler = Sampler()
        self._shadows: dict[int, Sequence] = {}

    @property
    def shadows(self) -> Iterable[Sequence]:
        return self._shadows.values()

    def follow_only(self, sequences: Iterable[Sequence]) -> None:
        """Lets go of all sequences but these."""
        kept = {seq.request_id for seq in sequences}
        for request_id in [request_id for request_id in self._shadows if request_id not in kept]:
            self.blocks.release(self._shadows.pop(request_id))

    def guess(self, sequences: ListLike[Sequence], lengths: ListLike[int]) -> list[list[int]]:
        """Up to `lengths[i]` tokens that may follow sequence i; none where its prompt is not read yet or blocks are short."""
        guesses: dict[int, list[int]] = {seq.request_id: [] for seq in sequences}
        limits = {seq.request_id: length for seq, length in zip(sequences, lengths, strict=True)}
        active = self._caught_up([self._shadow(seq) for seq, length in zip(sequences, lengths, strict=True) if length > 0])
        while active:
            start = time.perf_counter()
            step = Schedule(active, [shadow.num_uncomputed for shadow in active])
            hidden = self.runner.forward(build_batch(step, self.blocks.block_size, self.runner.device))
            results = self._sampler.sample(self.runner.logits(hidden), active)
            if sum(step.num_tokens) <= 2 * len(active):
                self._measured(time.perf_counter() - start)
            going: list[Sequence] = []
            for shadow, result in zip(active, results, strict=True):
                shadow.num_computed = len(shadow.token_ids)
                guess = guesses[shadow.request_id]
                token_id = result.token_id
                if result.error or token_id >= self._vocab_size or shadow.accept(token_id) is not None:
                    continue
                guess.append(token_id)
                if len(guess) < limits[shadow.request_id] and self.blocks.grow(shadow, len(shadow.token_ids)):
                    going.append(shadow)
            active = going
        return [guesses[seq.request_id] for seq in sequences]

    def _measured(self, seconds: float) -> None:
        seconds = min(seconds, 4 * self.round_seconds or seconds)
        self.round_seconds += (LEARNING if self.round_seconds else 1.0) * (seconds - self.round_seconds)

    def _shadow(self, seq: Sequence) -> Sequence:
        """The shadow of a sequence, with its tokens and where its sampling stands; what is computed and still right stays."""
        shadow = self._shadows.get(seq.request_id)
        if shadow is not None and shadow.num_shifts != seq.num_shifts:
            self.blocks.release(shadow)
            shadow = None
        if shadow is None:
            params = msgspec.structs.replace(seq.params, grammar="", trigger=None, logprobs=-1, max_tokens=-1, shift=False)
            shadow = Sequence(seq.request_id, seq.token_ids[:], params, seq.context_length, seq.seed)
            shadow.num_shifts = seq.num_shifts
            self._shadows[seq.request_id] = shadow
            self.blocks.share(shadow, self.blocks.lookup(shadow))
        else:
            old, new = shadow.token_ids, seq.token_ids
            right = min(shadow.num_computed, len(new) - 1)
            first = shadow.num_registered * self.blocks.block_size  # up to there it was confirmed
            while first < right and old[first] == new[first]:
                first += 1
            shadow.num_computed = min(right, first)
            shadow.token_ids = new[:]
            self.blocks.trim(shadow, len(new))
            self.blocks.register(shadow)
        shadow.num_generated = seq.num_generated
        shadow.penalties = seq.penalties.copy() if seq.penalties is not None else None
        shadow.grammar = seq.grammar.copy() if seq.grammar is not None else None
        return shadow

    def _caught_up(self, shadows: list[Sequence]) -> list[Sequence]:
        """Those whose next forward pass can begin their guess; of the others, a chunk of what they have to read is read."""
        ready: list[Sequence] = []
        behind = Schedule()
        budget = self._budget
        for shadow in sorted(shadows, key=lambda shadow: shadow.num_uncomputed):
            count = min(shadow.num_uncomputed, budget)
            if not count or not self.blocks.grow(shadow, shadow.num_computed + count):
                continue
            budget -= count
            if count == shadow.num_uncomputed:
                ready.append(shadow)
            else:
                behind.sequences.append(shadow)
                behind.num_tokens.append(count)
        if len(behind):
            self.runner.forward(build_batch(behind, self.blocks.block_size, self.runner.device))
            for shadow, count in zip(behind.sequences, behind.num_tokens, strict=True):
                shadow.num_computed += count
                self.blocks.register(shadow)
        return ready
