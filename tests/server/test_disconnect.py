"""A client that leaves costs nothing, whenever and however it leaves."""

from __future__ import annotations

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.daemon import Daemon, connect, leave, request_bytes

MODEL = "smollm2"
LIMIT = 1.0  # second: less than any answer here takes; how long it takes on a quiet machine, test_faults.py measures
LONG = {"model": MODEL, "prompt": "Count: one, two,", "options": {"num_predict": 2000, "seed": 1}}
PREFILL = {"model": MODEL, "prompt": "many words " * 1500, "options": {"num_predict": 2000}}
BODIES = {
    "/api/generate": LONG,
    "/api/chat": {"model": MODEL, "messages": [{"role": "user", "content": "Tell a long story."}], "options": LONG["options"]},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 2000,
    },
    "/v1/completions": {"model": MODEL, "prompt": "Tell a long story.", "max_tokens": 2000},
}


@pytest.fixture(autouse=True)
def loaded(daemon: Daemon) -> None:
    assert daemon.post("/api/generate", {"model": MODEL, "prompt": "", "keep_alive": "5m"}).status_code == 200
    daemon.seconds_until_idle()


def start(daemon: Daemon, path: str, body: object) -> socket.socket:
    sock = connect(daemon)
    sock.sendall(request_bytes("POST", path, body))
    return sock


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", list(BODIES))
def test_generation_stops(daemon: Daemon, path: str, stream: bool, how: str) -> None:
    with start(daemon, path, {**BODIES[path], "stream": stream}) as sock:
        wait_until_running(daemon)
        leave(sock, how)
        assert daemon.seconds_until_idle() <= LIMIT


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_prompt_stops_too(daemon: Daemon, stream: bool) -> None:
    sock = start(daemon, "/api/generate", {**PREFILL, "stream": stream})
    wait_until_running(daemon)
    sock.close()
    assert daemon.seconds_until_idle() <= LIMIT + 4  # a step of 512 prompt tokens is not broken off


def wait_until_running(daemon: Daemon) -> None:
    deadline = time.monotonic() + 20
    while daemon.stats()["num_running"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_hundred_in_random_phases(daemon: Daemon) -> None:
    """Streaming or not, closed or reset, from before the first byte is answered to well into the text."""
    rng = random.Random(5)
    plans = [
        (rng.random() * 0.4, rng.choice(list(BODIES)), rng.random() < 0.7, rng.choice(["close", "reset"])) for _ in range(200)
    ]

    def one(plan: tuple[float, str, bool, str]) -> None:
        seconds, path, stream, how = plan
        sock = start(daemon, path, {**BODIES[path], "stream": stream})
        time.sleep(seconds)
        leave(sock, how)

    survivor: list[str] = []
    watched = threading.Thread(target=lambda: survivor.append(greedy(daemon)))
    before = greedy(daemon)
    with ThreadPoolExecutor(16) as pool:
        watched.start()
        list(pool.map(one, plans))
    watched.join()
    assert survivor == [before]
    daemon.seconds_until_idle(5)
    assert daemon.engine()["requests"] == 0


def greedy(daemon: Daemon) -> str:
    body = {"model": MODEL, "prompt": "What is the sea?", "stream": False, "options": {"temperature": 0, "num_predict": 12}}
    return str(daemon.post("/api/generate", body).json()["response"])


def test_a_client_that_does_not_read_does_not_hold_others_up(daemon: Daemon) -> None:
    idle = start(daemon, "/api/generate", LONG)
    try:
        begin = time.monotonic()
        assert greedy(daemon)
        assert time.monotonic() - begin < 20
    finally:
        idle.close()
    daemon.seconds_until_idle()
