"""A scheduled step on the model: forward, logits, tokens. Knows no request and no scheduling.

A failure ends only the sequences at fault: a step that fails is run again, one by one. With an accelerator, steps that only
decode are recorded (`graphs`), tokens are drawn on the device, and a step may be started before the results of the one before
it are known (`start`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ollamapy.engine import prompt_logprobs
from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.adapters import forward
from ollamapy.engine.batch import Batch
from ollamapy.engine.build import build_batch, num_wanted
from ollamapy.engine.device_sampler import DeviceSampler, Drawn, drawable
from ollamapy.engine.graphs import Feed, Graphs, recordable
from ollamapy.engine.pooling import pooled_result
from ollamapy.engine.protocol import Plan
from ollamapy.engine.runner import ModelRunner
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.engine.speculation import agreed
from ollamapy.engine.transfer import sent
from ollamapy.errors import EngineError, failure_text, lacks_memory

log = logging.getLogger(__name__)

_HOST_READERS = ("attention", "write_kv", "moe")  # ops whose reference reads sizes on the host


@dataclass(slots=True)
class Flight:
    """A step whose results were not read yet."""

    schedule: Schedule
    drawn: Drawn
    start: float

    def results(self) -> list[list[Result]]:
        """Waits for them. Raises EngineError when the device is lost."""
        try:
            return [[result] for result in self.drawn.results()]
        except torch.AcceleratorError as error:
            raise EngineError(f"the device failed: {error}") from error


def flies(seq: Sequence) -> bool:
    """Whether a token of it can be drawn before the host has seen the one before."""
    params = seq.params
    return seq.grammar is None and seq.penalties is None and not params.dry_multiplier


class Execution:
    """Runs steps of one model. `kernels` (op -> implementation) tell whether steps can be recorded. Raises EngineError only
    where the device is lost."""

    def __init__(
        self, runner: ModelRunner, plan: Plan, kernels: Mapping[str, str], accelerator: Accelerator | None = None
    ) -> None:
        self.runner, self.plan = runner, plan
        self.sampler = Sampler()
        self.graphs: Graphs | None = None
        self._device_sampler: DeviceSampler | None = None
        self._no_graphs = _objection(plan, kernels, accelerator is not None)
        if accelerator is not None:
            self._device_sampler = DeviceSampler(self.sampler, accelerator.fetch)
            if not self._no_graphs:
                self.graphs = Graphs(self._logits, accelerator, plan, scratch=plan.num_blocks)

    @property
    def graph_facts(self) -> dict[str, int | str]:
        """For `Stats.graphs`: what is recorded, or why nothing is; empty on a device that records nothing."""
        if self.graphs is not None:
            return self.graphs.facts
        return {"state": self._no_graphs} if self._no_graphs else {}

    def run(self, schedule: Schedule) -> list[list[Result]]:
        """Runs a step. When it fails, its sequences are run one by one, once, so that only those at fault end."""
        try:
            return self._run(schedule)
        except torch.AcceleratorError as error:  # every later call would fail too: the process has to be replaced
            raise EngineError(f"the device {self.plan.device} failed: {error}") from error
        except Exception as error:
            if self._made_room(error):
                return self.run(schedule)
            log.exception("step of %d sequences failed", len(schedule))
            if len(schedule) == 1:
                return [[Result(error=failure_text(error))]]
        return [self.run(part)[0] for part in schedule.parts()]

    def can_start(self, schedule: Schedule) -> bool:
        sequences = schedule.sequences
        return self._device_sampler is not None and recordable(schedule) and all(map(flies, sequences)) and drawable(sequences)

    def start(self, schedule: Schedule, before: Flight | None = None) -> Flight | None:
        """Gives the device a step and does not wait. `before`: the step whose tokens are this one's. None when that failed:
        then it is to be run by `run`, which finds out why."""
        assert self._device_sampler is not None
        start = time.perf_counter()

        def feed(token_ids: Tensor) -> None:
            assert before is not None
            tokens, owners = before.drawn.tokens, before.schedule.sequences
            if len(owners) != len(schedule):
                rows = {seq: row for row, seq in enumerate(owners)}
                tokens = tokens[sent(torch.tensor([rows[seq] for seq in schedule.sequences]), tokens.device)]
            token_ids.copy_(tokens.clamp(min=0))  # -1: it failed, and what follows it is thrown away

        try:
            with torch.inference_mode():
                logits = self._decode(schedule, None if before is None else feed)
                drawn = self._device_sampler.start(logits, schedule.sequences, schedule.ahead)
        except torch.AcceleratorError as error:
            raise EngineError(f"the device {self.plan.device} failed: {error}") from error
        except Exception:
            log.exception("step of %d sequences failed", len(schedule))
            return None
        return Flight(schedule, drawn, start)

    def _decode(self, schedule: Schedule, feed: Feed | None = None) -> Tensor:
        """Logits (n, V) of a step that is `recordable`."""
        logits = None if self.graphs is None else self.graphs.logits(schedule, feed)
        if logits is None:
            batch = build_batch(schedule, self.plan.block_size, self.runner.device)
            if feed is not None:
                feed(batch.token_ids)
            logits = self._logits(batch)
        return logits

    def _logits(self, batch: Batch) -> Tensor:
        return self.runner.logits(self.runner.forward(batch))

    def _run(self, schedule: Schedule) -> list[list[Result]]:
        if self.graphs is not None and recordable(schedule):
            with torch.inference_mode():
                return [[result] for result in self._draw(self._decode(schedule), schedule.sequences)]
        hidden = forward(self.runner, schedule, self.plan.block_size)
        results: list[list[Result]] = [[] for _ in schedule.sequences]
        sampled: list[int] = []  # indices of sequences that get a token, one for each row
        sequences: list[Sequence] = []  # as they are at that row
        rows: list[int] = []  # of `hidden`
        row = 0
        errors: dict[int, str] = {}  # by index
        pooled: list[tuple[int, int, Tensor]] = []  # index, length and hidden states of sequences to embed
        for index, (seq, length) in enumerate(zip(schedule.sequences, schedule.num_tokens, strict=True)):
            count = num_wanted(seq, length)
            if own := seq.num_to_tell(length):
                errors[index] = prompt_logprobs.tell(
                    seq, hidden[row : row + own], self.runner.logits, self.runner.model.config.vocab_size
                )
                row, count = row + own, count - own
            if seq.pooling is not None:
                pooled.append((index, length, hidden[row : row + count]))
            elif count:
                sampled += [index] * count
                sequences += seq.rows(count - 1)
                rows += range(row, row + count)
            row += count
        if sampled:
            wanted = hidden if len(rows) == hidden.shape[0] else hidden[rows]
            for index, result in zip(sampled, self._sample(wanted, sequences), strict=True):
                results[index].append(result)
        for index, length, states in pooled:  # last: a step that is run again must not have pooled anything yet
            found = pooled_result(schedule.sequences[index], length, states)
            results[index] = [] if found is None else [found]
        for index, error in errors.items():
            results[index] = [Result(error=error)] if error else results[index]
        return [agreed(seq.draft, found) for seq, found in zip(schedule.sequences, results, strict=True)]

    def _sample(self, hidden: Tensor, sequences: list[Sequence]) -> list[Result]:
        """Tokens after the hidden states (n, E). When that fails, row by row, so that only rows at fault do."""
        try:
            return self._draw(self.runner.logits(hidden), sequences)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if self._made_room(error):
                return self._sample(hidden, sequences)
            log.exception("sampling of %d sequences failed", len(sequences))
            if len(sequences) == 1:
                return [Result(error=failure_text(error))]
        return [self._sample(hidden[row : row + 1], [seq])[0] for row, seq in enumerate(sequences)]

    def _made_room(self, error: Exception) -> bool:
        """Whether memory was short and recorded steps have given back theirs, so that another try may have it."""
        made = lacks_memory(error) and self.graphs is not None and self.graphs.drop()
        if made:
            log.warning("recorded steps are dropped to make room: %s", error)
        return made

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> list[Result]:
        if self._device_sampler is not None and drawable(sequences):
            return self._device_sampler.start(logits, sequences).results()
        return self.sampler.sample(logits, sequences)


def _objection(plan: Plan, kernels: Mapping[str, str], accelerated: bool) -> str:
    """Why no steps are recorded; "" where they are, and on a device that records nothing."""
    if not accelerated:
        split = plan.spans and any(span.device != "cpu" for span in plan.spans)
        return "off: some layers are on the CPU, and steps do not overlap" if split else ""
    if not plan.cuda_graphs:
        return "off: OLLAMAPY_CUDA_GRAPHS=0"
    readers = [op for op in _HOST_READERS if kernels.get(op) == "reference"]
    return f"off: the reference kernels of {', '.join(readers)} read sizes on the host" if readers else ""
