"""Clients that leave in every phase, answers in churn, models that come and go: nothing stays held, nothing is mixed up.

The engine is the real one with a model of a few kilobytes, or, where only the daemon is in question, one that counts.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import psutil
import pytest

from bench import fake_engine
from bench.server import MODEL as COUNTING
from tests.scripted import write_scripted
from tests.server import counting
from tests.server.daemon import Daemon, connect, leave, request_bytes, running

MODEL = "endless"
SEATS = 4
OPTIONS = {"num_predict": 20000, "num_batch": SEATS, "repeat_last_n": 0}
LONG = {"model": MODEL, "prompt": "a", "options": OPTIONS}
SHORT = {**LONG, "options": {**OPTIONS, "num_predict": 40}}
TOKENIZE = {**LONG, "prompt": "a b " * 100_000}  # the daemon needs a second for its 400,000 tokens
PREFILL = {**LONG, "prompt": "a b " * 450, "options": {**OPTIONS, "num_ctx": 2048}}
LIMIT = 0.25  # seconds from a client's leaving until nothing of its request is left
SLOW = 10.0  # where the machine's speed is not in question


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("endless")
    path = write_scripted(folder / "m.gguf", [f"\u2581w{n}" for n in range(100)], loop=True)
    with running(folder / "models", folder / "log", OLLAMA_KEEP_ALIVE="-1", OLLAMA_CONTEXT_LENGTH="2048") as daemon:
        with ollama.Client(daemon.url) as client:
            client.create(MODEL, files={"m.gguf": client.create_blob(path)})
        load(daemon)
        yield daemon


def load(daemon: Daemon) -> None:
    assert daemon.post("/api/generate", {**LONG, "prompt": ""}).status_code == 200


def unload(daemon: Daemon) -> None:
    assert daemon.post("/api/generate", {"model": MODEL, "keep_alive": 0}).status_code == 200


def engines(daemon: Daemon) -> int:
    """Processes below the one that they are forked from."""
    return len(forkserver_of(daemon).children())


def forkserver_of(daemon: Daemon) -> psutil.Process:
    """Beside it the daemon may have a process that looks at schemas."""
    return next(each for each in psutil.Process(daemon.process.pid).children() if "forkserver" in " ".join(each.cmdline()))


def send(daemon: Daemon, body: object) -> socket.socket:
    sock = connect(daemon)
    sock.sendall(request_bytes("POST", "/api/generate", body))
    return sock


def read_lines(sock: socket.socket, count: int) -> None:
    data = b""
    while data.count(b'"created_at"') < count and b'"done":true' not in data:
        data += sock.recv(4096)


def wait_for(condition: Callable[[], bool]) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < SLOW
        time.sleep(0.002)
    return time.monotonic() - start


def unsent(sock: socket.socket) -> int:
    """Bytes that the daemon has written to this connection and its client's kernel has not taken."""
    ours, theirs = (f"0100007F:{port:04X}" for _, port in (sock.getsockname(), sock.getpeername()))
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
    return next(int(row[4].split(":")[0], 16) for row in rows if row[1:3] == [theirs, ours])


class Phases:
    """Each makes a request, waits until it is in that phase, and gives its connection."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self.daemon, self.rng = daemon, rng

    def loading(self) -> socket.socket:
        unload(self.daemon)
        wait_for(lambda: engines(self.daemon) == 0)
        sock = send(self.daemon, LONG)
        time.sleep(self.rng.random() * 0.2)
        return sock

    def tokenize(self) -> socket.socket:
        sock = send(self.daemon, TOKENIZE)
        time.sleep(self.rng.random() * 0.1)
        return sock

    def blocked(self) -> socket.socket:
        """Its client reads nothing: what the kernel takes of the answer is full."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", self.daemon.port))
        sock.sendall(request_bytes("POST", "/api/generate", LONG))
        seen = 0
        while not seen or unsent(sock) != seen:
            seen = unsent(sock)
            time.sleep(0.05)
        return sock

    def whole(self) -> socket.socket:
        """Its answer would come in one piece."""
        sock = send(self.daemon, {**LONG, "stream": False})
        wait_for(lambda: self.daemon.stats()["num_running"] > 0)
        time.sleep(self.rng.random() * 0.05)
        return sock

    def prefill(self) -> socket.socket:
        sock = send(self.daemon, PREFILL)
        wait_for(lambda: self.daemon.stats()["num_running"] > 0)
        return sock

    def first_token(self) -> socket.socket:
        sock = send(self.daemon, LONG)
        read_lines(sock, 1)
        return sock

    def middle(self) -> socket.socket:
        sock = send(self.daemon, LONG)
        read_lines(sock, self.rng.randrange(5, 40))
        return sock

    def structured(self) -> socket.socket:
        sock = send(self.daemon, {**LONG, "format": {"type": "array", "items": {"type": "string"}}})
        time.sleep(self.rng.random() * 0.05)
        return sock

    def end(self) -> socket.socket:
        sock = send(self.daemon, SHORT)
        read_lines(sock, 1000)
        return sock


def nothing_left(daemon: Daemon) -> bool:
    rows = daemon.get("/api/ps?verbose=1")["models"]
    if not rows:
        return engines(daemon) == 0
    stats = rows[0]["engine"].get("stats")
    return stats is not None and rows[0]["engine"]["requests"] == stats["num_running"] == stats["used_blocks"] == 0


def disconnects(daemon: Daemon, plan: dict[str, int]) -> dict[str, list[float]]:
    """Seconds until nothing was left, of each; one after the other."""
    rng = random.Random(2)
    phases = Phases(daemon, rng)
    taken: dict[str, list[float]] = {name: [] for name in plan}
    for name, count in plan.items():
        for _ in range(count):
            sock = getattr(phases, name)()
            leave(sock, rng.choice(["close", "reset", "half-close"]), 0.05)
            taken[name].append(wait_for(lambda: nothing_left(daemon)))
        load(daemon)
        daemon.seconds_until_idle()
    return taken


def num_tasks(daemon: Daemon) -> int:
    return int(daemon.get("/api/ps?verbose=1")["daemon"]["tasks"])


def flush(daemon: Daemon) -> None:
    """New prompts until each block that lay in the cache has been given up for one of them: none is held by nobody."""
    before = daemon.stats()
    for number in range(100):
        if daemon.stats()["num_evictions"] - before["num_evictions"] >= before["cached_blocks"]:
            break
        body = {**PREFILL, "prompt": f"{number} " + "c d " * 450, "stream": False, "options": {**OPTIONS, "num_predict": 1}}
        assert daemon.post("/api/generate", body).status_code == 200
    else:
        pytest.fail(f"{before} {daemon.stats()}")
    daemon.seconds_until_idle()


def queued(daemon: Daemon, count: int) -> list[float]:
    """As `disconnects`, of requests that wait behind others; those go on."""
    seated = [send(daemon, LONG) for _ in range(SEATS)]
    wait_for(lambda: daemon.stats()["num_running"] == SEATS)
    taken = []
    for number in range(count):
        sock = send(daemon, LONG)
        wait_for(lambda: daemon.stats()["num_waiting"] == 1)
        leave(sock, ["close", "reset"][number % 2])
        taken.append(wait_for(lambda: daemon.stats()["num_waiting"] == 0))
    for sock in seated:
        read_lines(sock, 5)
        sock.close()
    wait_for(lambda: nothing_left(daemon))
    daemon.seconds_until_idle()
    return taken


PLAN = {
    "loading": 2,
    "tokenize": 3,
    "prefill": 4,
    "first_token": 4,
    "middle": 4,
    "structured": 4,
    "blocked": 2,
    "whole": 4,
    "end": 3,
}


def test_disconnects_in_every_phase(endless: Daemon) -> None:
    disconnects(endless, {"structured": 1})  # the process that looks at schemas has come, or not
    process = psutil.Process(endless.process.pid)
    files, children, tasks = process.num_fds(), len(process.children()), num_tasks(endless)
    disconnects(endless, PLAN)
    queued(endless, 5)
    flush(endless)
    wait_for(lambda: process.num_fds() <= files + 2)  # its two pipes
    wait_for(lambda: num_tasks(endless) <= tasks)
    assert len(process.children()) <= children + 1


@pytest.mark.slow
def test_a_thousand_disconnects(endless: Daemon) -> None:
    """All blocks are back within LIMIT, whatever the phase; descriptors of the daemon too."""
    disconnects(endless, PLAN)
    files, tasks = psutil.Process(endless.process.pid).num_fds(), num_tasks(endless)
    plan = {"loading": 40, **dict.fromkeys(PHASES, 100)}
    taken = {**disconnects(endless, plan), "queued": queued(endless, 160)}
    assert sum(map(len, taken.values())) == 1000
    flush(endless)
    for name, seconds in taken.items():
        ordered = sorted(seconds)
        print(f"{name}: median {ordered[len(ordered) // 2] * 1e3:.0f} ms, most {ordered[-1] * 1e3:.0f} ms")
        assert ordered[len(ordered) * 99 // 100] <= (1.0 if name == "loading" else LIMIT), name
    wait_for(lambda: psutil.Process(endless.process.pid).num_fds() <= files + 2)
    wait_for(lambda: num_tasks(endless) <= tasks)


def test_a_reader_that_stops_takes_no_more_than_its_share(endless: Daemon) -> None:
    """Its answer is not read at all: what waits for it is bounded, and others are answered in full."""
    stopped = send(endless, {**LONG, "options": {**OPTIONS, "num_predict": 20000}})
    try:
        before = psutil.Process(endless.process.pid).memory_info().rss
        for _ in range(5):
            assert endless.post("/api/generate", {**SHORT, "stream": False}).json()["eval_count"] == 40
        assert psutil.Process(endless.process.pid).memory_info().rss - before < 64 << 20
    finally:
        stopped.close()
    wait_for(lambda: nothing_left(endless))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_has_anothers_text(tmp_path_factory: pytest.TempPathFactory, count: int) -> None:
    """Each prompt names the word at which its answer begins; streamed or not, on both APIs, one in four is given up."""
    rng = random.Random(8)
    plans = [(number, rng.randrange(1, 30), rng.random()) for number in rng.choices(range(1000), k=count)]
    seen: Counter[str] = Counter()

    def ask(client: httpx.Client, url: str, plan: tuple[int, int, float]) -> str:
        first, tokens, chance = plan
        messages = [{"role": "user", "content": f"Begin at w{first:03}"}]
        body: dict[str, Any] = {"model": COUNTING, "messages": messages, "stream": chance < 0.7}
        expected = fake_engine.text(tokens, first).strip()
        if chance < 0.25:
            with client.stream("POST", f"{url}/api/chat", json={**body, "options": {"num_predict": 10000}}) as response:
                line = json.loads(next(response.iter_lines()))
            assert fake_engine.text(10000, first).strip().startswith(line["message"]["content"].strip())
            return "given up"
        if chance < 0.85:
            answer = client.post(f"{url}/api/chat", json={**body, "options": {"num_predict": tokens}})
            got = "".join(json.loads(line)["message"]["content"] for line in answer.text.splitlines())
        else:
            answer = client.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": tokens})
            got = answer.json()["choices"][0]["message"]["content"]
        assert got.strip() == expected, (plan, got)
        return "whole"

    with counting.counting(tmp_path_factory.mktemp("canaries")) as daemon:
        with httpx.Client(timeout=60, trust_env=False) as client, ThreadPoolExecutor(24) as pool:
            seen.update(pool.map(lambda plan: ask(client, daemon.url, plan), plans))
        (row,) = daemon.get("/api/ps?verbose=1")["models"]
    assert seen["whole"] > count // 2 and seen["given up"] > count // 8 and row["engine"]["requests"] == 0


def held(daemon: Daemon) -> dict[str, int]:
    process = psutil.Process(daemon.process.pid)
    forkserver = forkserver_of(daemon)
    found = {"engines": len(forkserver.children())}
    for name, each in (("daemon", process), ("forkserver", forkserver)):
        found |= {f"{name} files": each.num_fds(), f"{name} threads": each.num_threads(), f"{name} rss": each.memory_info().rss}
    return found


@pytest.mark.parametrize(("warm", "cycles"), [(3, 5), pytest.param(20, 100, marks=pytest.mark.slow)])
def test_models_that_come_and_go_leave_nothing(endless: Daemon, warm: int, cycles: int) -> None:
    def cycle() -> None:
        assert endless.post("/api/generate", {**SHORT, "stream": False}).json()["eval_count"] == 40
        unload(endless)
        wait_for(lambda: engines(endless) == 0)

    for _ in range(warm):
        cycle()
    before = held(endless)
    for _ in range(cycles):
        cycle()
    after = held(endless)
    print(before, after)
    for name, value in before.items():
        if name.endswith("rss"):
            assert after[name] - value < 8 << 20, name
        else:
            assert after[name] <= value + (2 if name.startswith("daemon") else 0), name
    load(endless)
