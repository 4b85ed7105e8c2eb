"""Schedule: what one step computes; and the account of a sequence that has ended. Knows no policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ollamapy.engine.protocol import Embedding, Finish, FinishReason
from ollamapy.engine.sequence import Sequence


@dataclass(slots=True)
class Schedule:
    """One step: `num_tokens[i]` tokens of `sequences[i]` after those it has computed, the tokens of its draft at the end.
    The first `num_decodes` of them have their prompt computed."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    ahead: int = 0  # 1: each sequence's one token is the result of the step before, which is not committed yet
    copies: list[tuple[int, int]] = field(default_factory=list)  # of blocks, from and to: before anything is written

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_decode_rows(self) -> int:
        return sum(self.num_tokens[: self.num_decodes])

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.num_tokens[self.num_decodes :])

    def parts(self) -> Iterator[Schedule]:
        """The same work, one sequence at a time."""
        return (Schedule([seq], [count]) for seq, count in zip(self.sequences, self.num_tokens, strict=True))


def embedding(seq: Sequence, vector: bytes) -> Embedding:
    return Embedding(seq.request_id, vector, seq.num_prompt_tokens, queue_ns=seq.first_scheduled_ns - seq.arrival_ns)


def finish(seq: Sequence, reason: FinishReason, now: int, error: str = "", bad_request: bool = False) -> Finish:
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
        bad_request=bad_request,
    )
