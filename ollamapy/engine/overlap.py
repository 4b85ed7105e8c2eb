"""Overlap: a step that only decodes starts before the results of the one before are read; its tokens never leave the device.

What one step too many computes is thrown away: a request that ended meanwhile, by a stop id or an abort, is in no book when
that step lands. Nothing else is planned while a step is in flight, so that nothing is preempted or given away: a prompt that
can be let in, a grammar, a guess or a context shift is waited for. Knows no tensor.
"""

from __future__ import annotations

import time

from ollamapy.engine.execution import Execution, Flight
from ollamapy.engine.fairness import overserved
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.scheduler import Scheduler
from ollamapy.engine.sequence import Result, Sequence

MOST_UNGUESSED = 8  # steps in a row, of sequences for which tokens might be guessed: a look at their text needs the tokens


class Overlap:
    """At most one step is in flight between two calls, and two within one."""

    def __init__(self, execution: Execution, scheduler: Scheduler) -> None:
        self._execution, self._scheduler = execution, scheduler
        self.flight: Flight | None = None
        self._landed = 0.0
        self._in_a_row = 0
        self.num_ahead = self.num_discarded = 0  # steps started ahead; tokens that came too late

    def start(self, schedule: Schedule) -> bool:
        """Starts a step without waiting; False where it has to be run as others are."""
        self._in_a_row = 0
        self.flight = self._execution.start(schedule) if self._execution.can_start(schedule) else None
        return self.flight is not None

    def land(self, may_follow: bool) -> tuple[Schedule, list[list[Result]], float]:
        """The step in flight without the sequences that are gone, its results and the seconds it took. Starts its successor
        first, where there can be one; that is the step in flight then."""
        flight = self.flight
        assert flight is not None
        self.flight = self._follow(flight) if may_follow else None
        results = flight.results()
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.start, self._landed), now
        return *self._left(flight.schedule, results), seconds

    def _left(self, step: Schedule, results: list[list[Result]]) -> tuple[Schedule, list[list[Result]]]:
        kept = [index for index, seq in enumerate(step.sequences) if self._is_there(seq)]
        self.num_discarded += len(step) - len(kept)
        left = Schedule([step.sequences[index] for index in kept], [1] * len(kept), sum(i < step.num_decodes for i in kept))
        return left, [results[index] for index in kept]

    def _is_there(self, seq: Sequence) -> bool:
        return self._scheduler.sequences.get(seq.request_id) is seq

    def _follow(self, flight: Flight) -> Flight | None:
        """The next token of all that run, if they all only decode; of those that will go on, as far as can be known."""
        scheduler = self._scheduler
        left = [seq for seq in flight.schedule.sequences if self._is_there(seq)]
        if len(left) != len(scheduler.running) or (scheduler.waiting and not _is_full(scheduler)):
            return None
        if self._in_a_row >= MOST_UNGUESSED and any(seq.params.speculation != "off" for seq in left):
            return None
        going = [seq for seq in left if not _ends(seq)]
        if scheduler.waiting and len(going) < len(left):
            return None  # somebody has their seats
        if not going or not all(scheduler.blocks.grow(seq, len(seq.token_ids) + 1) for seq in going):
            return None
        assert not scheduler.blocks.copies, "whoever is in flight has its last block to itself"
        started = self._execution.start(Schedule(going, [1] * len(going), len(going), ahead=1), flight)
        if started is not None:
            self._in_a_row += 1
            self.num_ahead += 1
        return started


def _is_full(scheduler: Scheduler) -> bool:
    """Whether none who waits can be let in before somebody ends: every seat is taken, and none by one who is to be put back."""
    now = time.monotonic_ns()
    taken = len(scheduler.running) == scheduler.max_num_seqs
    return taken and overserved(scheduler.waiting.next(now), scheduler.running, now) is None


def _ends(seq: Sequence) -> bool:
    """Whether its next token is the last that its context as it is can take."""
    return seq.num_generated + 1 >= seq.max_tokens or seq.num_free_places <= 1
