"""Shares, tiers, limits and what answers say of the queue: the real daemon, with a small model that never stops by itself."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ollama
import pytest

from tests.scripted import write_scripted
from tests.server.daemon import Daemon, connect, read_head, request_bytes, running

MODEL = "endless"
SEATS = 4
LONG = {"model": MODEL, "prompt": "a", "options": {"num_predict": 20000, "num_batch": SEATS, "repeat_last_n": 0}}
SHORT = {**LONG, "stream": False, "options": {**LONG["options"], "num_predict": 3}}  # type: ignore[dict-item]


@contextmanager
def endless(folder: Path, **variables: str) -> Iterator[Daemon]:
    """Four sequences run together; 40 may wait, and 20 of one client."""
    path = write_scripted(folder / "m.gguf", [f"\u2581w{n}" for n in range(100)], loop=True)
    settings = {"OLLAMA_MAX_QUEUE": "40", "OLLAMA_KEEP_ALIVE": "-1", **variables}
    with running(folder / "models", folder / "log", **settings) as daemon:
        daemon.headers = key("test")
        with ollama.Client(daemon.url, headers=dict(daemon.headers)) as client:
            client.create(MODEL, files={"m.gguf": client.create_blob(path)})
        assert daemon.post("/api/generate", {**LONG, "prompt": ""}).status_code == 200
        yield daemon


@pytest.fixture(scope="module")
def queued(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with endless(tmp_path_factory.mktemp("queued"), OLLAMAPY_API_KEYS="test,flood,light,one,two,three") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with endless(tmp_path_factory.mktemp("keyless")) as daemon:
        yield daemon


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


class Flood:
    """Requests of one client that do not end, each on a connection of its own."""

    def __init__(
        self, daemon: Daemon, count: int, headers: dict[str, str] | None, source: str = "127.0.0.1", **body: object
    ) -> None:
        """Without `headers`, each comes with a key that it made up."""
        self.daemon = daemon
        self.sockets: list[socket.socket] = []
        self.before = before = daemon.engine()["requests"]
        for number in range(count):
            sock = socket.create_connection(("127.0.0.1", daemon.port), timeout=60, source_address=(source, 0))
            sock.sendall(request_bytes("POST", "/api/generate", {**LONG, **body}, headers or key(f"made up {number}")))
            self.sockets.append(sock)
        deadline = time.monotonic() + 20
        while daemon.engine()["requests"] < before + count or not daemon.stats()["num_running"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()
        deadline = time.monotonic() + 10
        while self.daemon.engine()["requests"] > self.before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("by", ["key", "address"])
def test_one_request_passes_a_flood(request: pytest.FixtureRequest, by: str) -> None:
    """Within a few steps, though nothing of the flood ever ends. Where the server has no keys, what requests say of theirs does
    not matter: neither are those with different ones different clients, nor those with the same one the same."""
    queued: Daemon = request.getfixturevalue("queued" if by == "key" else "keyless")
    flood, light = (key("flood"), key("light")) if by == "key" else (None, key("made up 1"))
    with Flood(queued, 20, flood, "127.0.0.1" if by == "key" else "127.0.0.3"):
        assert queued.stats()["num_waiting"] == 20 - SEATS
        for _ in range(3):
            before = queued.stats()["num_steps"]
            answer = queued.post("/api/generate", SHORT, headers=light)
            assert answer.status_code == 200 and answer.json()["eval_count"] == 3
            assert float(answer.headers["x-queue-time-ms"]) < 2000
            assert queued.stats()["num_steps"] > before
        assert queued.stats()["num_waiting"] == 20 - SEATS, "the flood goes on"


def test_one_of_the_flood_waits(queued: Daemon) -> None:
    """The check of the check."""
    with Flood(queued, 8, key("flood")), connect(queued) as sock:
        sock.sendall(request_bytes("POST", "/api/generate", SHORT, key("flood")))
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_flex_goes_behind(queued: Daemon) -> None:
    with Flood(queued, 8, key("one"), service_tier="flex"):
        for path, body, headers in (
            ("/api/generate", SHORT, {}),
            ("/api/generate", {**SHORT, "service_tier": "priority"}, {"X-Service-Tier": "flex"}),
            ("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 3, "service_tier": "default"}, {}),
        ):
            answer = queued.post(path, body, headers={**key("one"), **headers})
            assert answer.status_code == 200, answer.text
    with Flood(queued, 8, key("one")), connect(queued) as sock:
        sock.sendall(request_bytes("POST", "/api/generate", SHORT, {**key("two"), "X-Service-Tier": "flex"}))
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1)


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions", "/api/embed", "/v1/embeddings"])
def test_unknown_tiers(queued: Daemon, path: str) -> None:
    answer = queued.post(path, {"model": MODEL, "prompt": "a", "input": "a", "service_tier": "gold"})
    assert answer.status_code == 400 and "invalid service_tier: 'gold'" in answer.text


def test_limits_of_one_client_and_of_all(queued: Daemon) -> None:
    with Flood(queued, SEATS + 20, key("one")):
        begin = time.monotonic()
        own = queued.post("/api/generate", SHORT, headers=key("one"))
        assert time.monotonic() - begin < 1.0
        assert own.status_code == 503 and "this client has 24 requests here, and at most 20 may wait" in own.json()["error"]
        assert 1 <= int(own.headers["retry-after"]) <= 300
        assert "x-queue-position" not in own.headers
        with Flood(queued, 20, key("two")):
            third = queued.post("/v1/completions", {"model": MODEL, "prompt": "a"}, headers=key("three"))
            assert third.status_code == 503 and int(third.headers["retry-after"]) >= 1
            assert "maximum pending requests exceeded" in third.json()["error"]["message"]
        assert queued.post("/api/generate", SHORT, headers=key("three")).status_code == 200


def test_answers_say_how_long_they_waited(queued: Daemon) -> None:
    alone = queued.post("/api/generate", SHORT)
    assert alone.headers["x-queue-position"] == "0" and 0 <= float(alone.headers["x-queue-time-ms"]) < 1000
    with Flood(queued, 7, key("one")) as flood, connect(queued) as sock:
        sock.sendall(request_bytes("POST", "/api/generate", LONG, key("one")))
        time.sleep(0.5)
        for other in flood.sockets:
            other.close()
        status, headers, _ = read_head(sock)
        assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
        assert int(headers["x-queue-position"]) == 3
        assert float(headers["x-queue-time-ms"]) >= 400


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
def test_embeddings_say_how_long_they_waited(queued: Daemon, path: str) -> None:
    alone = queued.post(path, {"model": MODEL, "input": ["a", "b"]})
    assert alone.headers["x-queue-position"] == "0" and float(alone.headers["x-queue-time-ms"]) < 1000
    with Flood(queued, SEATS + 3, key("one")) as flood, connect(queued) as sock:
        sock.sendall(request_bytes("POST", path, {"model": MODEL, "input": "a"}, {**key("one"), "X-Service-Tier": "flex"}))
        time.sleep(0.5)
        for other in flood.sockets:
            other.close()
        status, headers, _ = read_head(sock)
        assert status == 200 and int(headers["x-queue-position"]) == 3 and float(headers["x-queue-time-ms"]) >= 400


def test_a_big_request_of_embeddings_counts_as_several(queued: Daemon) -> None:
    """Of its 300 texts 64 are in the engine at a time, which is 8 requests; where nobody is before it, none is too big."""
    big = {"model": MODEL, "input": ["a"] * 300}
    assert len(queued.post("/api/embed", big).json()["embeddings"]) == 300
    with Flood(queued, SEATS + 13, key("one")):
        waiting = queued.stats()["num_waiting"]
        assert queued.post("/api/embed", big, headers=key("one")).status_code == 503
        with connect(queued) as sock:
            sock.sendall(request_bytes("POST", "/api/embed", big, {**key("two"), "X-Service-Tier": "flex"}))
            time.sleep(0.5)
            assert queued.stats()["num_waiting"] <= waiting + 64


def test_a_context_that_is_shifted_says_how_often(queued: Daemon) -> None:
    body = {**SHORT, "options": {**LONG["options"], "num_predict": 100, "num_ctx": 32}}  # type: ignore[dict-item]
    answer = queued.post("/api/generate", body).json()
    assert answer["eval_count"] == 100 and answer["context_shifts"] >= 5
    held = queued.post("/api/generate", {**body, "shift": False}).json()
    assert held["done_reason"] == "length" and held["eval_count"] < 32 and "context_shifts" not in held
    assert "context_shifts" not in queued.post("/api/generate", SHORT).json()


@pytest.mark.parametrize(
    "path, body",
    [
        ("/api/generate", {"prompt": "w1 " * 200, "truncate": False}),
        ("/api/chat", {"messages": [{"role": "user", "content": "w1 " * 200}], "truncate": False}),
        ("/v1/completions", {"prompt": "w1 " * 200}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1 " * 200}]}),
    ],
)
def test_what_may_not_be_cut_is_refused_with_both_counts(queued: Daemon, path: str, body: dict[str, object]) -> None:
    """num_ctx of the request holds on every API, and needs no reload."""
    pid = queued.engine()["pid"]
    options = {**LONG["options"], "num_ctx": 64, "num_predict": 2}  # type: ignore[dict-item]
    answer = queued.post(path, {"model": MODEL, "stream": False, "options": options, **body})
    text = json.dumps(answer.json())
    assert answer.status_code == 400, text
    assert "exceeds the available context of 64 tokens" in text and "the prompt has " in text
    wide = queued.post(path, {"model": MODEL, "stream": False, **body, "options": {**options, "num_ctx": 2000}})
    assert wide.status_code == 200 and queued.engine()["pid"] == pid


def test_what_may_be_cut_says_so(queued: Daemon) -> None:
    options = {**LONG["options"], "num_ctx": 64, "num_predict": 2}  # type: ignore[dict-item]
    answer = queued.post("/api/generate", {**SHORT, "prompt": "w1 " * 200, "options": options})
    assert answer.json()["truncated"] is True and answer.json()["prompt_tokens_total"] > 200
    assert "truncated" in answer.headers["x-ollamapy-warning"]
