"""Arrivals: requests that wait for what is made beside the steps, their grammar and their adapters. Knows no scheduling."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from ollamapy.engine.adapters import Adapters
from ollamapy.engine.batch import RowAdapter
from ollamapy.engine.grammar import Grammar
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.protocol import Finish
from ollamapy.engine.sequence import Sequence
from ollamapy.errors import BadRequest, OllamapyError, failure_text

log = logging.getLogger(__name__)

IDLE_WAIT = 0.02  # seconds after which an engine that has nothing else to do looks for commands


class Arrived(NamedTuple):
    """A request whose wait is over; with `failed` it has ended."""

    seq: Sequence
    failed: Finish | None = None


@dataclass(slots=True)
class _Awaited:
    seq: Sequence
    grammar: Future[Grammar] | None
    adapters: list[Future[RowAdapter]]  # others may wait for them too

    @property
    def pending(self) -> list[Future[Any]]:
        own: list[Future[Any]] = [] if self.grammar is None else [self.grammar]
        return [future for future in (*own, *self.adapters) if not future.done()]


class Arrivals:
    def __init__(self, grammars: Grammars, adapters: Adapters) -> None:
        self.grammars, self.adapters = grammars, adapters
        self._awaited: dict[int, _Awaited] = {}  # by request id

    def __len__(self) -> int:
        return len(self._awaited)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._awaited

    def begin(self, seq: Sequence) -> bool:
        """Whether a new sequence has to wait; `arrived` gives it when it need not any more."""
        params = seq.params
        if not params.grammar and not params.adapters:
            return False
        grammar = self.grammars.start(params.grammar, params.trigger) if params.grammar else None
        self._awaited[seq.request_id] = _Awaited(seq, grammar, [self.adapters.start(path) for path, _ in params.adapters])
        return True

    def abort(self, request_id: int) -> Sequence | None:
        """What nobody waits for is not begun any more."""
        found = self._awaited.pop(request_id, None)
        if found is None:
            return None
        if found.grammar is not None:
            found.grammar.cancel()
        return found.seq

    def arrived(self, idle: bool) -> list[Arrived]:
        """Those whose wait is over. With nothing else to do (`idle`), waits a little for one."""
        pending = [future for each in self._awaited.values() for future in each.pending]
        if idle and all(each.pending for each in self._awaited.values()):
            wait(pending, IDLE_WAIT, FIRST_COMPLETED)
        done = [each for each in self._awaited.values() if not each.pending]
        for each in done:
            del self._awaited[each.seq.request_id]
        return [_arrived(each) for each in done]


def _arrived(awaited: _Awaited) -> Arrived:
    seq = awaited.seq
    try:
        seq.adapters = tuple(
            (found.result(), scale) for found, (_, scale) in zip(awaited.adapters, seq.params.adapters, strict=True)
        )
    except Exception as error:
        known = isinstance(error, OllamapyError | OSError)
        return _failed(seq, "no adapter", error, str(error) if known else failure_text(error), bad_request=known)
    try:
        seq.grammar = None if awaited.grammar is None else awaited.grammar.result()
    except Exception as error:
        text = str(error) if isinstance(error, OllamapyError) else failure_text(error)
        return _failed(seq, "no grammar", error, text, bad_request=isinstance(error, BadRequest))
    return Arrived(seq)


def _failed(seq: Sequence, what: str, error: Exception, text: str, bad_request: bool = False) -> Arrived:
    log.error("request %d: %s: %s", seq.request_id, what, error)
    return Arrived(seq, Finish("error", seq.num_prompt_tokens, error=text, bad_request=bad_request))
