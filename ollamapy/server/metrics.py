"""Prometheus' view of the daemon, on an address of its own. Knows nothing of requests but their sums.

What means the same as in vLLM has vLLM's name (`vllm:...`), so that dashboards and autoscalers made for it fit;
what only exists here begins with `ollamapy_`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import accumulate
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ollamapy import __version__
from ollamapy.api.address import Address
from ollamapy.engine.protocol import STEP_TOKENS, Stats
from ollamapy.errors import OllamapyError
from ollamapy.lifecycle.resident import Running
from ollamapy.lifecycle.residents import Residents
from ollamapy.server.middleware import Guard
from ollamapy.server.record import Figures, Histogram, Totals

log = logging.getLogger(__name__)

STATS_TIMEOUT = 1.0  # seconds that engines have to tell their figures; one amid a long step shows those it told before
_FINISHED = {"repeat": "repetition"}  # where vLLM's word for a reason is another

_COUNTERS: tuple[tuple[str, str, Callable[[Figures], int]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens of finished requests, cached ones too", lambda f: f.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated", lambda f: f.generation_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache", lambda f: f.cache_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda f: f.cache_hits),
    ("ollamapy_context_shifts", "Times that a full context lost its older half", lambda f: f.context_shifts),
    ("ollamapy_prompt_tokens_cut", "Tokens of prompts that were too long and were cut", lambda f: f.cut_tokens),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Figures], Histogram]], ...] = (
    (
        "vllm:time_to_first_token_seconds",
        "From the request to its first token, loading included",
        lambda f: f.time_to_first_token,
    ),
    ("vllm:inter_token_latency_seconds", "Between a request's tokens", lambda f: f.inter_token),
    ("vllm:e2e_request_latency_seconds", "From the request to the end of its answer", lambda f: f.end_to_end),
    ("vllm:request_queue_time_seconds", "In the engine's queue", lambda f: f.queue),
    ("vllm:request_prefill_time_seconds", "From a request's first step to its first token", lambda f: f.prefill),
    ("vllm:request_decode_time_seconds", "From a request's first token to its last", lambda f: f.decode),
    ("vllm:request_inference_time_seconds", "From a request's first step to its last token", lambda f: f.inference),
    ("vllm:request_time_per_output_token_seconds", "Decoding, by tokens after the first", lambda f: f.per_token),
    ("vllm:request_prompt_tokens", "Prompt tokens per request", lambda f: f.prompt_lengths),
    ("vllm:request_generation_tokens", "Generated tokens per request", lambda f: f.generation_lengths),
)
_GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("vllm:num_requests_running", "Requests in the engine's batch", lambda s: s.num_running),
    ("vllm:num_requests_waiting", "Requests in the engine's queue", lambda s: s.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 1 is all", lambda s: s.used_blocks / max(1, s.total_blocks)),
)
_ENGINE_COUNTERS: tuple[tuple[str, str, Callable[[Stats], int]], ...] = (
    ("vllm:num_preemptions", "Requests put back into the queue", lambda s: s.num_preemptions),
    ("vllm:spec_decode_num_drafts", "Guesses verified", lambda s: s.num_drafts),
    ("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead and verified", lambda s: s.num_draft_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that came true", lambda s: s.num_accepted_tokens),
    ("ollamapy_cached_blocks_evicted", "KV blocks kept for reuse that were given to others", lambda s: s.num_evictions),
    ("ollamapy_disk_blocks_written", "KV blocks of prefixes written to files", lambda s: s.disk_written_blocks),
    ("ollamapy_disk_tokens_read", "Prompt tokens whose KV blocks came from files", lambda s: s.disk_read_tokens),
    ("ollamapy_disk_bad_files", "Damaged files of prefixes, deleted", lambda s: s.disk_bad_files),
    ("ollamapy_disk_failed_writes", "Files of prefixes that could not be written", lambda s: s.disk_failed_writes),
)


class Metrics:
    """Everything a scrape shows. Imports prometheus_client, so it is made only where metrics are asked for."""

    def __init__(self, totals: Totals, residents: Residents) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._totals, self._residents = totals, residents
        self._engines: list[tuple[Running, Stats | None]] = []
        self._stats: dict[int, Stats] = {}  # engine's process -> what it told last
        self._counts: Counter[tuple[str, str]] = Counter()  # by model and counter, of all engines that there were
        self._steps: dict[str, Histogram] = {}  # by model
        self._registry = CollectorRegistry()
        self._registry.register(self)  # a collector by its methods
        ProcessCollector(registry=self._registry)

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, in the form that `accept` asks for."""
        from prometheus_client.exposition import choose_encoder

        self._engines = await self._ask()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    async def _ask(self) -> list[tuple[Running, Stats | None]]:
        rows = self._residents.running()
        told = await asyncio.gather(*(self._told(row) for row in rows))
        self._stats = {row.engine.pid: stats for row, stats in zip(rows, told, strict=True) if stats is not None}
        return list(zip(rows, told, strict=True))

    async def _told(self, row: Running) -> Stats | None:
        before = self._stats.get(row.engine.pid)
        try:
            stats = await asyncio.wait_for(row.engine.stats(), STATS_TIMEOUT)
        except (TimeoutError, OllamapyError):  # amid a long step, or it ended just now
            return before
        self._add(row.name.short(), stats, before)
        return stats

    def _add(self, model: str, stats: Stats, before: Stats | None) -> None:
        """What an engine has done since it told its figures `before`."""
        for name, _, value in _ENGINE_COUNTERS:
            self._counts[model, name] += value(stats) - (value(before) if before else 0)
        steps = self._steps.setdefault(model, Histogram(STEP_TOKENS))
        told = before.step_tokens if before else (0,) * len(stats.step_tokens)
        for place, (now, then) in enumerate(zip(stats.step_tokens, told, strict=True)):
            steps.counts[place] += now - then
        steps.sum += stats.num_step_tokens - (before.num_step_tokens if before else 0)

    def describe(self) -> list[Any]:
        """Names are not known beforehand; registering does not collect."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield from self._of_requests()
        for name, help, value in _GAUGES:
            gauge = GaugeMetricFamily(name, help, labels=["model_name"])
            for row, stats in self._engines:
                if stats is not None:
                    gauge.add_metric([row.name.short()], value(stats))
            yield gauge
        yield from self._of_engines()
        size = GaugeMetricFamily("ollamapy_model_bytes", "Weights and KV cache of a loaded model", labels=["model_name"])
        resident = GaugeMetricFamily("ollamapy_engine_resident_bytes", "Memory of an engine's process", labels=["model_name"])
        for row, _ in self._engines:
            size.add_metric([row.name.short()], row.size)
            resident.add_metric([row.name.short()], row.resident_bytes)
        answers = CounterMetricFamily("ollamapy_http_requests", "Answers by API and status", labels=["dialect", "status"])
        for (dialect, status), count in self._totals.answers.items():
            answers.add_metric([dialect, str(status)], count)
        refused = CounterMetricFamily(
            "ollamapy_requests_refused",
            "Requests refused as too many waited",
            labels=["model_name", "limit"],
        )
        for (model, limit), count in self._totals.refused.items():
            refused.add_metric([model, limit], count)
        yield refused
        version = GaugeMetricFamily("ollamapy_build", "1, with the version", labels=["version"])
        version.add_metric([__version__], 1)
        yield from (size, resident, answers, version)

    def _of_engines(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        for name, help, _ in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, help, labels=["model_name"])
            for (model, counted), count in self._counts.items():
                if counted == name:
                    counter.add_metric([model], count)
            yield counter
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of an engine's step", labels=["model_name"])
        for model, steps in self._steps.items():
            family.add_metric([model], _buckets(steps), steps.sum)
        yield family

    def _of_requests(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        models = list(self._totals.models.items())
        for name, help, value in _COUNTERS:
            counter = CounterMetricFamily(name, help, labels=["model_name"])
            for model, figures in models:
                counter.add_metric([model], value(figures))
            yield counter
        for name, help, histogram in _HISTOGRAMS:
            family = HistogramMetricFamily(name, help, labels=["model_name"])
            for model, figures in models:
                found = histogram(figures)
                family.add_metric([model], _buckets(found), found.sum)
            yield family
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended", labels=["model_name", "finished_reason"]
        )
        for model, figures in models:
            for reason, count in figures.finished.items():
                finished.add_metric([model, _FINISHED.get(reason, reason)], count)
        yield finished


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


class _Beside(uvicorn.Server):
    """Runs in the loop of another server, whose signals it leaves alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(metrics: Metrics, address: Address, sockets: list[socket.socket]) -> AsyncIterator[None]:
    """Answers GET /metrics on `sockets` and nothing else. Host and Origin are checked as on the API's address."""

    async def show(request: Request) -> Response:
        content, content_type = await metrics.scrape(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    app = Starlette(routes=[Route("/metrics", show)], middleware=[Middleware(Guard, address, ())])
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    server = _Beside(config)
    task = asyncio.create_task(server.serve(sockets))
    try:
        yield
    finally:
        server.should_exit = True
        await task
