"""No request stops the engine, none is answered with a fault of ours, and others do not notice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.daemon import Daemon
from tests.server.hostile import EXTREMES, FIELDS, ODD_TEXTS, OPTIONS, RELOADING, Request, requests
from tests.server.test_errors import INSIDES

MODEL = "smollm2"
GOLDEN = {"prompt": "The capital of France is", "stream": False, "options": {"temperature": 0, "num_predict": 8}}


def ask(daemon: Daemon, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body).encode()
    answer = httpx.post(daemon.url + path, content=content, timeout=60, trust_env=False, verify=False)  # no TLS to set up
    assert answer.status_code < 500 or answer.status_code in (501, 503), (path, body, answer.text)
    assert answer.status_code == 200 or not INSIDES.search(answer.text), answer.text
    return answer


@pytest.fixture(scope="module")
def pid(daemon: Daemon) -> int:
    daemon.post("/api/generate", {"model": MODEL, "prompt": ""})
    return int(daemon.engine()["pid"])


@pytest.mark.parametrize("option", [name for name in OPTIONS.split() if name not in RELOADING])
def test_options(daemon: Daemon, pid: int, option: str) -> None:
    for value in EXTREMES:
        options = {"num_predict": 2, "seed": 1, option: value}
        if option == "num_predict" and isinstance(value, int | float) and not 0 <= value <= 2:
            options["stop"] = [" ", "e", "."]
        ask(daemon, "/api/generate", {"model": MODEL, "prompt": "Hi there", "stream": False, "options": options})
    assert daemon.engine()["pid"] == pid


@pytest.mark.parametrize("field", FIELDS.split())
def test_fields(daemon: Daemon, pid: int, field: str) -> None:
    for value in EXTREMES:
        if field == "keep_alive" and isinstance(value, int | float) and value < 60:
            continue  # 0 unloads it at once, a second before a slow machine asks again
        options = {"num_predict": 2}
        ask(daemon, "/api/generate", {"model": MODEL, "prompt": "Hi", "stream": False, "options": options, field: value})
    assert daemon.engine()["pid"] == pid


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_texts(daemon: Daemon, pid: int, text: str) -> None:
    options = {"num_predict": 2}
    for body in (
        {"prompt": text},
        {"prompt": "x", "system": text},
        {"prompt": "x", "template": text},
        {"prompt": text, "raw": True},
    ):
        ask(daemon, "/api/generate", {"model": MODEL, "stream": False, "options": options, **body})
    for role in ("user", "system", "assistant", "tool", text):
        turns = [{"role": role, "content": text}]
        ask(daemon, "/api/chat", {"model": MODEL, "stream": False, "options": options, "messages": turns})
        ask(daemon, "/v1/chat/completions", {"model": MODEL, "max_tokens": 2, "messages": turns})
    ask(daemon, "/api/embed", {"model": MODEL, "input": [text, text]})
    ask(daemon, "/api/generate", {"model": text, "prompt": "x"})
    ask(daemon, "/api/show", {"model": text})
    ask(daemon, "/api/copy", {"source": MODEL, "destination": text + "/../../x"})
    assert daemon.engine()["pid"] == pid


def test_context_tokens(daemon: Daemon, pid: int) -> None:
    for context in ([-1], [2**31], [49152], [0, 1, 2], list(range(500))):
        ask(
            daemon,
            "/api/generate",
            {"model": MODEL, "prompt": "x", "context": context, "stream": False, "options": {"num_predict": 1}},
        )
    assert daemon.engine()["pid"] == pid
    daemon.seconds_until_idle()


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_beside_golden_traffic(daemon: Daemon, pid: int, count: int) -> None:
    """Eight at a time, of any kind; a normal request beside them has its answer, always the same one."""
    refused = done = 0

    def hostile(request: Request) -> int:
        return ask(daemon, *request).status_code

    golden = {"model": MODEL, **GOLDEN}
    expected = ask(daemon, "/api/generate", golden).json()["response"]
    with ThreadPoolExecutor(8) as pool:
        for begin in range(0, count, 40):
            statuses = pool.map(hostile, requests(begin, MODEL, min(40, count - begin)))
            assert ask(daemon, "/api/generate", golden).json()["response"] == expected
            for status in statuses:
                done, refused = done + (status == 200), refused + (status != 200)
    print(f"{done} answered, {refused} refused")
    assert done > count / 10 and refused > count / 10, (done, refused)
    assert daemon.engine()["pid"] == pid
    daemon.seconds_until_idle()
