"""No request stops the engine, none is answered with a fault of ours, and others do not notice."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.daemon import Daemon
from tests.server.test_errors import INSIDES

MODEL = "smollm2"
EXTREMES: list[Any] = [-1, 0, 1, 2**31, 2**63, -(2**63), 1e308, -1e308, 1.5, "1", "", [], {}, None, True, "\x00", "\ud800"]
OPTIONS = "num_ctx num_batch num_gpu num_thread num_keep seed num_predict top_k top_p min_p typical_p repeat_last_n"
OPTIONS += " temperature repeat_penalty presence_penalty frequency_penalty stop main_gpu use_mmap draft_num_predict"
RELOADING = (
    "num_ctx",
    "num_batch",
    "num_thread",
    "num_gpu",
    "main_gpu",
    "use_mmap",
)  # each value of these loads the model again
FIELDS = "prompt suffix system template context raw stream format options keep_alive think truncate shift logprobs top_logprobs"
ODD_TEXTS = [
    "\ud800\udc00 \udfff",
    "\x00\x01\x7f",
    "<|im_end|>" * 50,
    "{{",
    "{% for x in range(10**9) %}",
    "\u202e" * 9,
    "😀" * 40,
]


def ask(daemon: Daemon, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body).encode()
    answer = httpx.post(daemon.url + path, content=content, timeout=60, trust_env=False)
    assert answer.status_code < 500 or answer.status_code == 501, (body, answer.text)
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
