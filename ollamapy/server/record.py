"""What one request cost, and the sums over all of them: plain numbers, cheap to keep. Knows no HTTP and no text."""

from __future__ import annotations

import logging
import secrets
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ollamapy.engine.protocol import NOBODY, Caller, Finish

log = logging.getLogger(__name__)

# Upper bounds in seconds and in tokens; those of vLLM's histograms, so that its dashboards' quantiles stay what they are.
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
SLOW = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


CLIENT_LEFT = 499  # nobody was there for a status; nginx's number for it


class Histogram:
    """`counts[i]` observations lie in (bounds[i - 1], bounds[i]]; the last of them above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Figures:
    """Sums of one model. Cache figures count prompt tokens: those looked for, and those found."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = self.cache_queries = self.cache_hits = 0
        self.draft_tokens = self.accepted_tokens = 0
        self.context_shifts = self.cut_tokens = 0
        self.finished: Counter[str] = Counter()
        self.time_to_first_token, self.inter_token = Histogram(FAST), Histogram(FAST)
        self.end_to_end, self.queue = Histogram(SLOW), Histogram(SLOW)
        self.prefill, self.decode = Histogram(SLOW), Histogram(SLOW)
        self.prompt_lengths, self.generation_lengths = Histogram(TOKENS), Histogram(TOKENS)


class Totals:
    """Of all requests since the daemon started: by model, and answers by API and status."""

    def __init__(self) -> None:
        self.models: dict[str, Figures] = {}
        self.answers: Counter[tuple[str, int]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()  # by model and whose limit it was

    def of(self, model: str) -> Figures:
        return self.models.setdefault(model, Figures())


@dataclass(slots=True)
class Record:
    """One request. Times are monotonic nanoseconds, `*_ns` without "start" or "last" are durations; never any text of it."""

    totals: Totals
    method: str = ""
    path: str = ""
    client: str = ""
    caller: Caller = NOBODY
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")
    start: int = field(default_factory=time.monotonic_ns)
    status: int = 0
    body_bytes: int = 0  # of JSON: no text or list of the request is longer
    model: str = ""
    finish: str = ""  # stop, length, repeat, abort, error; "" where nothing was generated
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0  # guessed ahead, and those of them that came true
    accepted_tokens: int = 0
    queue_position: int = -1  # how many waited when it came; -1 where there was no queue
    queue_ns: int = 0
    context_shifts: int = 0
    cut_tokens: int = 0  # of a prompt that was too long
    prompt_ns: int = 0
    decode_ns: int = 0
    last: int = 0  # when the latest token came
    _figures: Figures | None = None

    @property
    def dialect(self) -> str:
        return "openai" if self.path.startswith("/v1/") else "ollama"

    def begin(self, model: str) -> None:
        """`model` is the name of one that is here: names that clients make up are not kept."""
        self.model = model
        self._figures = self.totals.of(model)

    def took(self, num_tokens: int, now: int) -> None:
        """Tokens came from the engine at `now`; several at once count as if they had come one by one since the last."""
        self.completion_tokens += num_tokens
        figures = self._figures
        if figures is None or not num_tokens:
            return
        figures.generation_tokens += num_tokens
        if self.last:
            figures.inter_token.observe((now - self.last) / 1e9 / num_tokens, num_tokens)
        else:
            figures.time_to_first_token.observe((now - self.start) / 1e9)
        self.last = now

    def generated(self, reason: str, finish: Finish | None) -> None:
        """A generation ended; `finish` is the engine's account where there is one."""
        self.finish = reason
        if finish is not None:
            self.queue_ns = finish.queue_ns
            self.prompt_ns, self.decode_ns = finish.prompt_ns, finish.decode_ns
            self.context_shifts = finish.num_shifts
            self.draft_tokens, self.accepted_tokens = finish.drafted_tokens, finish.accepted_tokens

    @asynccontextmanager
    async def failing(self) -> AsyncIterator[None]:
        """An error in here is how the generation ended; being closed or cancelled is not one."""
        try:
            yield
        except Exception:
            self.finish = "error"
            raise

    def client_left(self) -> None:
        self.status = self.status or CLIENT_LEFT

    def close(self) -> None:
        """The request is over: into the totals and the log."""
        total = time.monotonic_ns() - self.start
        self.totals.answers[self.dialect, self.status] += 1
        if self._figures is not None and self.finish:
            self._add(self._figures, total)
        if log.isEnabledFor(logging.INFO):
            log.info("request %s", " ".join(f"{name}={_shown(value)}" for name, value in self._fields(total).items()))

    def _add(self, figures: Figures, total: int) -> None:
        figures.finished[self.finish] += 1
        figures.prompt_tokens += self.prompt_tokens
        figures.cache_queries += self.prompt_tokens
        figures.cache_hits += self.cached_tokens
        figures.context_shifts += self.context_shifts
        figures.cut_tokens += self.cut_tokens
        figures.draft_tokens += self.draft_tokens
        figures.accepted_tokens += self.accepted_tokens
        figures.end_to_end.observe(total / 1e9)
        figures.queue.observe(self.queue_ns / 1e9)
        figures.prefill.observe(self.prompt_ns / 1e9)
        figures.decode.observe(self.decode_ns / 1e9)
        figures.prompt_lengths.observe(self.prompt_tokens)
        figures.generation_lengths.observe(self.completion_tokens)

    def _fields(self, total: int) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "id": self.id,
            "client": self.client,
            "dialect": self.dialect,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "total_ms": _ms(total),
        }
        if self.model:
            fields["model"] = self.model
        if self.finish:
            fields |= {
                "finish": self.finish,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
                "queue_ms": _ms(self.queue_ns),
                "prompt_ms": _ms(self.prompt_ns),
                "decode_ms": _ms(self.decode_ns),
            }
        return fields


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)


def _shown(value: Any) -> str:
    """A word stands as it is; anything else as a JSON string, so that no value can end a line or make up a field."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not any(c in text for c in ' "=\\')
    return text if text and plain else msgspec.json.encode(text).decode()


_current: ContextVar[Record] = ContextVar("record")


def enter(record: Record) -> None:
    """`record` is that of the request that this task serves."""
    _current.set(record)


def current() -> Record:
    """The record of the request being served; one that nobody reads where there is none."""
    found = _current.get(None)
    return found if found is not None else Record(Totals())
