"""What takes long is done beside the event loop: the daemon answers others meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.daemon import Daemon

MODEL = "smollm2"
WORDS = "many different words of one long text " * 60000  # 2.3 MB
SPIN = "{{ range .Messages }}" + "{{ range $.Messages }}" * 17 + "{{ end }}" * 18  # 2 ** 18 rounds
NO_CUT = {"stream": False, "truncate": False}


@pytest.mark.parametrize("path, body", [
    ("/api/generate", {"prompt": "x", "system": WORDS}),
    ("/api/generate", {"prompt": "x", "system": "y", "template": SPIN}),
    ("/api/generate", {"prompt": "x", "context": [1000] * 1_000_000}),
])  # fmt: skip
def test_the_daemon_answers_while_a_long_prompt_is_made(daemon: Daemon, path: str, body: dict[str, Any]) -> None:
    daemon.post("/api/generate", {"model": MODEL, "prompt": ""})
    content = httpx.Request("POST", daemon.url, json={"model": MODEL, **NO_CUT, **body}).content
    statuses: list[int] = []
    waits: list[float] = []
    headers = {"Content-Type": "application/json"}

    def ask() -> None:
        answer = httpx.post(daemon.url + path, content=content, headers=headers, timeout=60, trust_env=False)
        statuses.append(answer.status_code)

    asking = threading.Thread(target=ask)
    begin = time.monotonic()
    asking.start()
    with httpx.Client(trust_env=False, timeout=60) as client:
        while asking.is_alive():
            start = time.monotonic()
            client.get(daemon.url + "/api/version")
            waits.append(time.monotonic() - start)
    seconds = time.monotonic() - begin
    assert statuses == [400]
    assert max(waits) < seconds / 2, (max(waits), seconds)
