"""OpenTelemetry spans of requests, over OTLP/HTTP. Imports the SDK only where an endpoint is set; sees no text of a request.

A span for each request that a model answered, child of the client's `traceparent`, and beneath it queue, prefill and decode.
Attributes have the names of OpenTelemetry's conventions for generative AI.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ollamapy import __version__
from ollamapy.server.record import Record

log = logging.getLogger(__name__)

MISSING = 'OTEL_EXPORTER_OTLP_ENDPOINT is set, but no spans are sent: pip install "ollamapy[otel]"'
FLUSH_MS = 3000  # that the last spans get at the daemon's end
MAX_ANSWERS = 8  # of a request whose phases are told, three spans each; its own span sums up all of them
_OPERATIONS = {"/api/chat": "chat", "/v1/chat/completions": "chat", "/api/embed": "embeddings", "/v1/embeddings": "embeddings"}


class Tracing:
    """Spans are made when a request is over, from its record, and sent in batches by a thread of the SDK."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {"service.name": "ollamapy", "service.version": __version__}
        self._provider = TracerProvider(resource=Resource(named).merge(Resource.create()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ollamapy", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def finished(self, record: Record, traceparent: str) -> None:
        """`traceparent`: the request's header, "" where there is none. A request without a model leaves no span."""
        if not record.model:
            return
        from opentelemetry import trace

        offset, now = time.time_ns() - time.monotonic_ns(), time.monotonic_ns()
        parent = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        operation = _OPERATIONS.get(record.path, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {record.model}",
            parent,
            trace.SpanKind.SERVER,
            attributes=_attributes(record, operation),
            start_time=record.start + offset,
        )
        if record.status >= 500 or any(answer.finish == "error" for answer in record.answers):
            span.set_status(trace.StatusCode.ERROR)
        for answer in record.answers[:MAX_ANSWERS]:
            if not answer.end or not answer.last:
                continue
            inside = trace.set_span_in_context(span)
            at = max(answer.last - answer.decode_ns - answer.prompt_ns - answer.queue_ns, record.start)
            for name, duration in (("queue", answer.queue_ns), ("prefill", answer.prompt_ns), ("decode", answer.decode_ns)):
                part = self._tracer.start_span(name, inside, start_time=at + offset)
                at += duration
                part.end(at + offset)
        span.end(now + offset)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def _attributes(record: Record, operation: str) -> dict[str, Any]:
    answers = record.answers
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "ollamapy",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.id,
        "gen_ai.usage.input_tokens": sum(answer.prompt_tokens for answer in answers),
        "gen_ai.usage.output_tokens": sum(answer.completion_tokens for answer in answers),
        "gen_ai.usage.cache_read.input_tokens": sum(answer.cached_tokens for answer in answers),
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
    }
    return found | ({"gen_ai.response.finish_reasons": [answer.finish for answer in answers]} if answers else {})


def start(endpoint: str) -> Tracing | None:
    """None without an endpoint, or where the SDK is not installed, which is said once."""
    if not endpoint:
        return None
    try:
        return Tracing()
    except ImportError:
        log.warning(MISSING)
        return None
