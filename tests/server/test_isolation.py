"""A tokenizer that fails on one request's text, going in or coming out: that request ends, and nobody else notices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench import fake_engine
from bench.server import MODEL, create
from tests.server import broken_text
from tests.server.daemon import Daemon, running

SERVE = (sys.executable, str(Path(broken_text.__file__)))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("isolation")
    with running(folder / "models", folder / "log", command=SERVE) as made:
        create(made.url, folder, {})
        yield made


def body_of(path: str, content: str, stream: bool, tokens: int = 40) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    limits = (
        {"max_tokens": tokens, "seed": 100} if path.startswith("/v1/") else {"options": {"num_predict": tokens, "seed": 100}}
    )
    return {"model": MODEL, "messages": messages, "stream": stream, **limits}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("content", [broken_text.BAD_PROMPT, "Begin at w660"])
def test_the_others_go_on(daemon: Daemon, path: str, stream: bool, content: str) -> None:
    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(daemon.post, path, body_of(path, f"Begin at w{n}00", stream=False)) for n in range(1, 5)]
        failed = pool.submit(daemon.post, path, body_of(path, content, stream)).result()
        for number, other in enumerate(others, start=1):
            answer = other.result().json()
            text = answer["message"]["content"] if "message" in answer else answer["choices"][0]["message"]["content"]
            assert text.strip() == fake_engine.text(40, number * 100).strip()
    if stream and content != broken_text.BAD_PROMPT:
        *told, last = [line.removeprefix("data: ") for line in failed.text.splitlines() if line]
        assert failed.status_code == 200 and len(told) >= 1 and "error" in json.loads(last), failed.text
    else:
        assert failed.status_code == 500 and failed.json()["error"]
    assert "secret" not in failed.text and "secret" in daemon.log.read_text()
    assert daemon.engine()["requests"] == 0, "its generation was ended"


def test_the_engine_is_the_same(daemon: Daemon) -> None:
    daemon.post("/api/chat", body_of("/api/chat", "w100", stream=False))
    before = daemon.engine()["pid"]
    assert daemon.post("/api/chat", body_of("/api/chat", "w660", stream=False)).status_code == 500
    assert daemon.post("/api/chat", body_of("/api/chat", broken_text.BAD_PROMPT, stream=False)).status_code == 500
    assert daemon.engine()["pid"] == before
