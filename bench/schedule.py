"""What the scheduler makes of many users where steps take what a formula says: no kernels, no noise, a second of work.

    python -m bench.schedule [--users 16] [--clients 1]

A closed loop of users who send their next chat when the last is answered, two chats each, with prompts and answers of about the
lengths of `bench.serve`. Only the order and the sizes of steps are the engine's own.
"""

from __future__ import annotations

import argparse
import random
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from bench.load import percentile
from bench.table import align
from ollamapy.engine.protocol import Caller, Output, Plan, SamplingParams
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.scheduler import Scheduler
from ollamapy.engine.sequence import Result, Sequence

ROUNDS = 2
SHORT, LONG = (34, 64), (1400, 16)  # tokens of a prompt and of its answer
WORKLOADS = {"short": (SHORT,), "separate": ((1030, 64),), "mixed": (LONG, SHORT, SHORT, SHORT)}  # in turn
SPREAD = 25  # lengths differ by one part in so many
LATER = 0.005  # seconds after the first user in which the others come: one prompt is begun alone
CONTEXT = 2048


class Cost(NamedTuple):
    """Seconds: of a step that decodes one row, of each row more, of prompts beside rows, and of each of their tokens."""

    base: float
    row: float
    mixed: float
    token: float

    def seconds(self, rows: int, prompt_tokens: int) -> float:
        beside = self.row * (rows - 1) + (self.mixed if prompt_tokens else 0.0) if rows else 0.0
        return self.base + beside + self.token * prompt_tokens


COSTS = {"SmolLM2": Cost(0.0028, 0.0005, 0.002, 0.00042), "gemma3": Cost(0.005, 0.0013, 0.003, 0.00035)}
"""Of two cores of an AMD EPYC, roughly."""


class Loop:
    """One closed loop. `sent` and `arrivals` are by request id, in seconds of the formula."""

    def __init__(self, cost: Cost, workload: str, clients: int = 1) -> None:
        self.cost, self.workload, self.clients = cost, WORKLOADS[workload], clients
        self.clock = 0.0
        self.sent: list[float] = []
        self.arrivals: dict[int, list[float]] = {}
        self._random = random.Random(1)
        self._scheduler = Scheduler(Plan("", num_blocks=8192, context_length=CONTEXT))

    def send(self, at: float) -> None:
        number = len(self.sent)
        length, wanted = self.workload[number % len(self.workload)]
        length += self._random.randint(-(length // SPREAD), length // SPREAD)
        ids = array("q", [self._random.randrange(1000) for _ in range(length)])
        params, caller = SamplingParams(temperature=0.0, max_tokens=wanted), Caller(str(number % self.clients))
        self._scheduler.add(Sequence(number, ids, params, CONTEXT, arrival_ns=1 + number, caller=caller))
        self.sent.append(at)

    def run(self, users: int) -> dict[str, float]:
        """tokens/s, and percentiles in ms: to the first token, and between tokens."""
        self.send(0.0)
        done = self.step()
        for _ in range(users - 1):
            self.send(LATER)
        while done < users * ROUNDS:
            ended = self.step()
            done += ended
            for _ in range(min(ended, users * ROUNDS - len(self.sent))):
                self.send(self.clock)
        firsts = [1e3 * (self.arrivals[number][0] - sent) for number, sent in enumerate(self.sent)]
        gaps = [1e3 * (later - earlier) for own in self.arrivals.values() for earlier, later in pairwise(own)]
        return {
            "tokens/s": sum(map(len, self.arrivals.values())) / self.clock,
            "TTFT mean": sum(firsts) / len(firsts),
            **{f"TTFT p{percent}": percentile(firsts, percent) for percent in (50, 99)},
            **{f"gap p{percent}": percentile(gaps, percent) for percent in (50, 99)},
        }

    def step(self) -> int:
        """How many requests it has ended."""
        step = self._scheduler.schedule()
        rows, tokens = step.num_decode_rows, step.num_prompt_tokens
        seconds = self.cost.seconds(rows, tokens)
        self.clock += seconds
        self._scheduler.pace.record(rows, tokens, seconds)
        ended = 0
        for output in self._scheduler.commit(step, list(self._results(step))):
            assert isinstance(output, Output)
            self.arrivals.setdefault(output.request_id, []).extend([self.clock] * len(output.token_ids))
            ended += output.finish is not None
        return ended

    def _results(self, step: Schedule) -> Iterator[list[Result]]:
        for seq, count in zip(step.sequences, step.num_tokens, strict=True):
            yield [Result(self._random.randrange(1000))] if count == seq.num_uncomputed else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--clients", type=int, default=1, help="callers between whom the requests are shared out")
    args = parser.parse_args()
    rows = []
    for model, cost in COSTS.items():
        for workload in WORKLOADS:
            found = Loop(cost, workload, args.clients).run(args.users)
            rows.append([model, workload, *(f"{value:.0f}" for value in found.values())])
    print("\n".join(align([["costs of", "workload", *found], *rows])))


if __name__ == "__main__":
    main()
