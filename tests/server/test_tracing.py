"""Spans that a daemon sends to a collector, which reads them with OpenTelemetry's own messages."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.server import MODEL
from ollamapy.server import tracing
from tests.daemon import ROOT
from tests.server.counting import counting
from tests.server.daemon import Daemon

SECRET = "xyzzy-77aa"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps what is posted to /v1/traces."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posted)
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found

    def wait_for(self, count: int) -> list[Any]:
        deadline = time.monotonic() + 10
        while len(found := self.spans()) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found


class Posted(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Daemon]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with counting(tmp_path_factory.mktemp("tracing"), **variables) as made:
        yield made


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_below_its_clients_with_its_phases(daemon: Daemon, collector: Collector) -> None:
    collector.bodies.clear()
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "stream": False, "max_tokens": 9, "seed": 30}
    answer = daemon.post("/v1/chat/completions", body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    spans = {span.name: span for span in collector.wait_for(4)}
    assert set(spans) == {f"chat {MODEL}:latest", "queue", "prefill", "decode"}
    request = spans.pop(f"chat {MODEL}:latest")
    assert request.trace_id.hex() == TRACE and request.parent_span_id.hex() == PARENT
    found = attributes(request)
    usage = answer.json()["usage"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 9
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.response.id"] == answer.headers["x-request-id"] and found["http.response.status_code"] == 200
    order = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(span.parent_span_id == request.span_id and span.trace_id == request.trace_id for span in order)
    times = [request.start_time_unix_nano]
    for span in order:
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    assert times == sorted(times) and times[-1] <= request.end_time_unix_nano <= time.time_ns()
    assert not any(SECRET.encode() in sent for sent in collector.bodies)


def test_each_of_several_answers_has_its_phases(daemon: Daemon, collector: Collector) -> None:
    collector.bodies.clear()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "seed": 100, "n": 2}
    daemon.post("/v1/chat/completions", {**body, "stop": ["w005"]})
    spans = collector.wait_for(7)
    names = sorted(span.name for span in spans)
    assert names == [f"chat {MODEL}:latest", "decode", "decode", "prefill", "prefill", "queue", "queue"]
    request = next(span for span in spans if span.name.startswith("chat"))
    reasons = attributes(request)["gen_ai.response.finish_reasons"]
    assert [value.string_value for value in reasons.values] == ["stop", "stop"]


def test_a_request_without_a_parent_begins_a_trace(daemon: Daemon, collector: Collector) -> None:
    collector.bodies.clear()
    daemon.get("/api/tags")  # no model: no span
    daemon.post("/api/generate", {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_predict": 1, "seed": 0}})
    daemon.post("/api/generate", {"model": "none", "prompt": "x"})
    spans = collector.wait_for(1)
    assert {span.name for span in spans} <= {f"text_completion {MODEL}:latest", "queue", "prefill", "decode"}
    (request,) = [span for span in spans if span.name.startswith("text_completion")]
    assert request.parent_span_id == b"" and request.trace_id.hex() != TRACE


def test_a_collector_that_is_gone_costs_no_answer(tmp_path: Path) -> None:
    with counting(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_EXPORTER_OTLP_TIMEOUT="1") as daemon:
        body = {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_predict": 3, "seed": 0}}
        assert daemon.post("/api/generate", body).status_code == 200
        start = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - start < 15


def test_a_missing_sdk_is_said() -> None:
    code = (
        "import sys, logging; logging.basicConfig(); sys.modules['opentelemetry.sdk'] = None\n"
        "from ollamapy.server import tracing; assert tracing.start('http://x') is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, cwd=ROOT)
    assert done.returncode == 0 and tracing.MISSING in done.stderr, done.stderr
    assert tracing.start("") is None
