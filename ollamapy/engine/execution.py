"""A scheduled step on the model: forward, logits, tokens. A failure ends only the sequences at fault. Knows no request."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ollamapy.engine import prompt_logprobs
from ollamapy.engine.adapters import forward
from ollamapy.engine.build import num_wanted
from ollamapy.engine.pooling import pooled_result
from ollamapy.engine.protocol import Plan
from ollamapy.engine.runner import ModelRunner
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.engine.speculation import agreed
from ollamapy.errors import EngineError

log = logging.getLogger(__name__)


class Execution:
    """Runs steps of one model. Raises EngineError only where the device is lost."""

    def __init__(self, runner: ModelRunner, plan: Plan) -> None:
        self._runner, self.sampler = runner, Sampler()
        self._device, self._block_size = plan.device, plan.block_size
        self._vocab_size = runner.model.config.vocab_size

    def run(self, schedule: Schedule) -> list[list[Result]]:
        """Runs a step. When it fails, its sequences are run one by one, once, so that only those at fault end."""
        try:
            return self._once(schedule)
        except torch.AcceleratorError as error:  # every later call would fail too: the process has to be replaced
            raise EngineError(f"the device {self._device} failed: {error}") from error
        except Exception as error:
            log.exception("step of %d sequences failed", len(schedule))
            if len(schedule) == 1:
                return [[Result(error=failure_text(error))]]
        return [self.run(part)[0] for part in schedule.parts()]

    def _once(self, schedule: Schedule) -> list[list[Result]]:
        hidden = forward(self._runner, schedule, self._block_size)
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
                errors[index] = prompt_logprobs.tell(seq, hidden[row : row + own], self._runner.logits, self._vocab_size)
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
            return self.sampler.sample(self._runner.logits(hidden), sequences)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("sampling of %d sequences failed", len(sequences))
            if len(sequences) == 1:
                return [Result(error=failure_text(error))]
        return [self._sample(hidden[row : row + 1], [seq])[0] for row, seq in enumerate(sequences)]


def failure_text(error: BaseException) -> str:
    """For users: without the message, which may tell paths and addresses."""
    return f"the model failed on this request ({type(error).__name__}); the log has the details"
