"""Clients that leave in every phase, answers in churn, models that come and go: nothing stays held, nothing is mixed up.

The engine is the real one with a model of a few kilobytes, or, where only the daemon is in question, one that counts.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ollama
import psutil
import pytest

from bench import fake_engine
from bench.server import MODEL as COUNTING
from tests.scripted import write_scripted
from tests.server import counting
from tests.server.daemon import Daemon, leave, running
from tests.server.phases import (
    LONG,
    MODEL,
    OPTIONS,
    PREFILL,
    SEATS,
    SHORT,
    Phases,
    engines,
    forkserver_of,
    load,
    read_lines,
    send,
    unload,
    wait_for,
)

LIMIT = 0.25  # seconds from a client's leaving until nothing of its request is left


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("endless")
    path = write_scripted(folder / "m.gguf", [f"\u2581w{n}" for n in range(100)], loop=True)
    with running(folder / "models", folder / "log", OLLAMA_KEEP_ALIVE="-1", OLLAMA_CONTEXT_LENGTH="2048") as daemon:
        with ollama.Client(daemon.url) as client:
            client.create(MODEL, files={"m.gguf": client.create_blob(path)})
        load(daemon)
        yield daemon


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
        body = {**PREFILL, "cache_salt": f"{number}", "stream": False, "options": {**OPTIONS, "num_predict": 1}}
        assert daemon.post("/api/generate", body).status_code == 200
    else:
        pytest.fail(f"{before} {daemon.stats()}")
    daemon.seconds_until_idle()


def queued(daemon: Daemon, count: int) -> list[float]:
    """As `disconnects`, of requests that wait behind others; those go on."""
    taken: list[float] = []
    while len(taken) < count:
        seated = [send(daemon, LONG) for _ in range(SEATS)]
        wait_for(lambda: daemon.stats()["num_running"] == SEATS)
        for number in range(min(20, count - len(taken))):  # the answers before them end after 20,000 tokens
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


PHASES = ("tokenize", "prefill", "first_token", "middle", "structured", "blocked", "whole", "end")
PLAN = {"loading": 2, **dict.fromkeys(PHASES, 2)}


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
@pytest.mark.timeout(900)
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
