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

from ollamapy.engine.protocol import NOBODY, Caller

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
        self.context_shifts = self.cut_tokens = 0
        self.finished: Counter[str] = Counter()
        self.time_to_first_token, self.inter_token = Histogram(FAST), Histogram(FAST)
        self.end_to_end, self.queue = Histogram(SLOW), Histogram(SLOW)
        self.prefill, self.decode, self.inference = Histogram(SLOW), Histogram(SLOW), Histogram(SLOW)
        self.per_token = Histogram(FAST)
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
class Answer:
    """One generation of a request, of which there may be several. Times as in `Record`."""

    begin: int  # when the request came
    prompt_tokens: int
    figures: Figures | None
    finish: str = "abort"  # until it is known: stop, length, repeat, error
    cached_tokens: int = 0
    completion_tokens: int = 0
    context_shifts: int = 0
    queue_ns: int = 0
    prompt_ns: int = 0
    decode_ns: int = 0
    last: int = 0  # when the latest token came
    end: int = 0

    def took(self, num_tokens: int, now: int) -> None:
        """Tokens came from the engine at `now`; several at once count as if they had come one by one since the last."""
        self.completion_tokens += num_tokens
        figures = self.figures
        if figures is None or not num_tokens:
            return
        figures.generation_tokens += num_tokens
        if self.last:
            figures.inter_token.observe((now - self.last) / 1e9 / num_tokens, num_tokens)
        else:
            figures.time_to_first_token.observe((now - self.begin) / 1e9)
            figures.inter_token.observe(0.0, num_tokens - 1)  # with the first, where this daemon was late
        self.last = now

    def generated(self, reason: str, prompt_ns: int, decode_ns: int, context_shifts: int) -> None:
        self.finish, self.end = reason, time.monotonic_ns()
        self.prompt_ns, self.decode_ns, self.context_shifts = prompt_ns, decode_ns, context_shifts

    @asynccontextmanager
    async def failing(self) -> AsyncIterator[None]:
        """An error in here is how the generation ended; being closed or cancelled is not one."""
        try:
            yield
        except Exception:
            self.finish = "error"
            raise

    def add(self, figures: Figures, now: int) -> None:
        figures.finished[self.finish] += 1
        figures.prompt_tokens += self.prompt_tokens
        figures.cache_queries += self.prompt_tokens
        figures.cache_hits += self.cached_tokens
        figures.context_shifts += self.context_shifts
        figures.end_to_end.observe(((self.end or now) - self.begin) / 1e9)
        figures.prompt_lengths.observe(self.prompt_tokens)
        if self.end and self.last:
            figures.queue.observe(self.queue_ns / 1e9)
            figures.prefill.observe(self.prompt_ns / 1e9)
            figures.decode.observe(self.decode_ns / 1e9)
            figures.inference.observe((self.prompt_ns + self.decode_ns) / 1e9)
            figures.per_token.observe(self.decode_ns / 1e9 / max(1, self.completion_tokens - 1))
            figures.generation_lengths.observe(self.completion_tokens)


@dataclass(slots=True)
class Record:
    """One request. Times are monotonic nanoseconds, `*_ns` are durations; never any text of it."""

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
    queue_position: int = -1  # how many waited when it came; -1 where there was no queue
    cut_tokens: int = 0  # of a prompt that was too long
    answers: list[Answer] = field(default_factory=list)
    _figures: Figures | None = None

    @property
    def dialect(self) -> str:
        return "openai" if self.path.startswith("/v1/") else "ollama"

    @property
    def queue_ns(self) -> int:
        """Of the answer that waited for longest."""
        return max((answer.queue_ns for answer in self.answers), default=0)

    def begin(self, model: str) -> None:
        """`model` is the name of one that is here: names that clients make up are not kept."""
        self.model = model
        self._figures = self.totals.of(model)

    def answer(self, prompt_tokens: int, num_waiting: int = -1) -> Answer:
        """One more begins; `num_waiting`: how many wait before it."""
        if not self.answers:
            self.queue_position = num_waiting
        self.answers.append(Answer(self.start, prompt_tokens, self._figures))
        return self.answers[-1]

    def client_left(self) -> None:
        self.status = self.status or CLIENT_LEFT

    def close(self) -> None:
        """The request is over: into the totals and the log."""
        now = time.monotonic_ns()
        self.totals.answers[self.dialect, self.status] += 1
        if self._figures is not None:
            for answer in self.answers:
                answer.add(self._figures, now)
            self._figures.cut_tokens += self.cut_tokens
        if log.isEnabledFor(logging.INFO):
            fields = self._fields(now - self.start)
            log.info("request %s", " ".join(f"{name}={_shown(value)}" for name, value in fields.items()))

    def _fields(self, total: int) -> dict[str, Any]:
        """Of several answers: all their tokens, and the longest times."""
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
        if self.answers:
            fields["finish"] = ",".join(sorted({answer.finish for answer in self.answers}))
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
                fields[name] = sum(getattr(answer, name) for answer in self.answers)
            for name in ("queue", "prompt", "decode"):
                fields[f"{name}_ms"] = _ms(max(getattr(answer, f"{name}_ns") for answer in self.answers))
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
