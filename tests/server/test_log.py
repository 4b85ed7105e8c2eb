"""The line that each request leaves in the log: what it says, what it must not say, and its id."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.server import MODEL
from tests.server.counting import counting
from tests.server.daemon import Daemon, connect, read_head, request_bytes

SECRET = "xyzzy-1d7f"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with counting(tmp_path_factory.mktemp("log"), OLLAMA_DEBUG="1") as made:
        yield made


def line_of(daemon: Daemon, id: str) -> dict[str, str]:
    deadline = time.monotonic() + 5
    while True:
        found = [line for line in daemon.log.read_text().splitlines() if f"request id={id} " in line]
        if found:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (line,) = found
    fields = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line.partition("msg=request ")[2])
    return dict(fields)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "dialect"), [("/api/chat", "ollama"), ("/v1/chat/completions", "openai")])
def test_a_request_leaves_a_line(daemon: Daemon, path: str, dialect: str, stream: bool) -> None:
    messages = [{"role": "user", "content": SECRET}]
    body = {"model": MODEL, "messages": messages, "stream": stream, "options": {"num_predict": 7}, "max_tokens": 7, "seed": 0}
    answer = daemon.post(path, body, headers={"X-Request-Id": "theirs"})
    id = answer.headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{16}", id)
    line = line_of(daemon, id)
    assert (
        line["model"] == f"{MODEL}:latest" and line["dialect"] == dialect and line["path"] == path and line["status"] == "200"
    )
    assert line["finish"] == "length" and line["completion_tokens"] == "7" and int(line["prompt_tokens"]) > 10
    assert line["client"].startswith("127.0.0.1:")
    assert all(float(line[name]) >= 0 for name in ("queue_ms", "prompt_ms", "decode_ms")) and float(line["total_ms"]) > 0


def test_no_text_of_a_request_is_logged(daemon: Daemon) -> None:
    body = {"model": MODEL, "prompt": SECRET, "system": SECRET, "stream": False, "options": {"num_predict": 3}}
    id = daemon.post("/api/generate?key=" + SECRET, body, headers={"Authorization": f"Bearer {SECRET}"}).headers["x-request-id"]
    line_of(daemon, id)
    assert SECRET not in daemon.log.read_text() and "w001" not in daemon.log.read_text()


def test_a_path_cannot_make_up_a_line(daemon: Daemon) -> None:
    answer = httpx.get(f"{daemon.url}/a%0Amsg=request%20id=req-0%22", trust_env=False)
    line = line_of(daemon, answer.headers["x-request-id"])
    assert line["status"] == "404" and line["path"] == r'"/a\nmsg=request id=req-0\""'


def test_refusals_have_an_id_too(daemon: Daemon) -> None:
    refused = httpx.get(f"{daemon.url}/api/tags", headers={"Host": "evil.example"}, trust_env=False)
    assert refused.status_code == 403 and line_of(daemon, refused.headers["x-request-id"])["status"] == "403"


def test_one_who_leaves_is_an_abort(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        body = {"model": MODEL, "prompt": "Count.", "options": {"num_predict": 5000, "seed": 50}}
        sock.sendall(request_bytes("POST", "/api/generate", body))
        status, headers, _ = read_head(sock)
    line = line_of(daemon, headers["x-request-id"])
    assert status == 200 and line["finish"] == "abort" and 0 < int(line["completion_tokens"]) < 5000


def test_what_has_no_model_has_no_tokens(daemon: Daemon) -> None:
    line = line_of(daemon, httpx.get(f"{daemon.url}/api/version", trust_env=False).headers["x-request-id"])
    assert "model" not in line and "finish" not in line and line["method"] == "GET"


def test_the_log_is_where_it_says(daemon: Daemon) -> None:
    assert isinstance(daemon.log, Path) and "source=ollamapy.server.record" in daemon.log.read_text()
