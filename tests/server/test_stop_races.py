"""Clients that chat, leave, embed, stop, load with other options, copy and delete over each other: each one is answered."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import ollama
import psutil
import pytest

from tests.scripted import write_scripted
from tests.server.daemon import Daemon, running
from tests.server.phases import engines, wait_for

_MAIN = """
import sys
from ollamapy.cli.main import main
from ollamapy.lifecycle import residents
residents.DRAIN = 1.0
sys.setswitchinterval(1e-6)
main()
"""
MODELS = ("one", "two")
WORDS = 100
STOPPED = 10.0  # seconds in which a model has ended: one for those that use it, two for itself, and what this machine is slow
LATE = 5.0  # seconds that nobody may hold the daemon up for


@pytest.fixture(scope="module")
def contended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Two models, of which one is loaded at a time; threads of the daemon take turns after each instruction."""
    folder = tmp_path_factory.mktemp("contended")
    command = (sys.executable, "-c", _MAIN, "serve")
    with running(folder / "models", folder / "log", command=command, OLLAMA_MAX_LOADED_MODELS="1") as daemon:
        with ollama.Client(daemon.url) as client:
            for name in MODELS:
                path = write_scripted(folder / f"{name}.gguf", [f"\u2581{name}{n}" for n in range(WORDS)], loop=True)
                client.create(name, files={"m.gguf": client.create_blob(path)})
        yield daemon


class Client(threading.Thread):
    """One that does so many things, at random. `seen` counts what became of them; `failed` is what should not be."""

    def __init__(self, daemon: Daemon, seed: int, things: int) -> None:
        super().__init__()
        self.rng, self.things = random.Random(seed), things
        self.http = httpx.Client(base_url=daemon.url, timeout=60, trust_env=False)
        self.seen: Counter[str] = Counter()
        self.failed: list[str] = []
        self.stopping: list[float] = []

    def run(self) -> None:
        kinds: list[Callable[[], str]] = [self.whole] * 6 + [self.leave] * 3 + [self.stop] * 4
        kinds += [self.embed, self.copy, self.delete, self.look, self.look]
        with self.http:
            for _ in range(self.things):
                kind = self.rng.choice(kinds)
                try:
                    self.seen[f"{kind.__name__}: {kind()}"] += 1
                except Exception as problem:
                    self.failed.append(f"{kind.__name__}: {problem!r}")

    def asked(self, tokens: int) -> dict[str, Any]:
        """Of a model or of a copy, which may not be there; one in eight needs the engine with other options."""
        options: dict[str, Any] = {"num_predict": tokens, "repeat_last_n": 0}
        if self.rng.random() < 0.125:
            options["num_batch"] = self.rng.choice([16, 32])
        name = self.rng.choice(MODELS)
        return {"model": self.rng.choice([name, name, f"{name}-copy"]), "prompt": "a", "options": options}

    def expected(self, body: dict[str, Any], tokens: int) -> list[str]:
        return [f"{body['model'].removesuffix('-copy')}{n % WORDS}" for n in range(tokens)]

    def whole(self) -> str:
        tokens = self.rng.randrange(1, 200)
        body = {**self.asked(tokens), "stream": self.rng.random() < 0.7}
        answer = self.http.post("/api/generate", json=body)
        lines = [json.loads(line) for line in answer.text.splitlines()]
        text = "".join(line.get("response", "") for line in lines)
        if error := lines[-1].get("error"):
            assert self.expected(body, tokens)[: len(text.split())] == text.split()
            return self.told(body, error)
        assert text.split() == self.expected(body, tokens), text
        return "whole"

    def told(self, body: dict[str, Any], error: str) -> str:
        known = ["the model was unloaded", *([f"model '{body['model']}' not found"] if "-copy" in body["model"] else [])]
        assert any(error.startswith(text) for text in known), error
        return error

    def leave(self) -> str:
        body = self.asked(20000)
        with self.http.stream("POST", "/api/generate", json=body) as answer:
            for number, line in enumerate(answer.iter_lines()):
                if error := json.loads(line).get("error"):
                    return self.told(body, error)
                if number == self.rng.randrange(10):
                    break
        return "left"

    def stop(self) -> str:
        start = time.monotonic()
        answer = self.http.post("/api/generate", json={"model": self.rng.choice(MODELS), "keep_alive": 0})
        self.stopping.append(time.monotonic() - start)
        assert answer.json()["done_reason"] == "unload", answer.text
        return "stopped"

    def embed(self) -> str:
        body = {"model": self.rng.choice(MODELS), "input": ["a", "b"]}
        answer = self.http.post("/api/embed", json=body).json()
        return self.told(body, answer["error"]) if "error" in answer else f"{len(answer['embeddings'])} vectors"

    def copy(self) -> str:
        name = self.rng.choice(MODELS)
        return str(self.http.post("/api/copy", json={"source": name, "destination": f"{name}-copy"}).status_code)

    def delete(self) -> str:
        return str(self.http.request("DELETE", "/api/delete", json={"model": f"{self.rng.choice(MODELS)}-copy"}).status_code)

    def look(self) -> str:
        path = self.rng.choice(["/api/ps?verbose=1", "/api/tags", "/api/version"])
        answer = self.http.get(path) if self.rng.random() < 0.7 else self.http.post("/api/show", json={"model": MODELS[0]})
        return str(answer.status_code)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("clients", "things"), [(10, 10), pytest.param(64, 80, marks=pytest.mark.slow)])
def test_stops_and_loads_in_the_middle_of_everything(contended: Daemon, clients: int, things: int) -> None:
    process = psutil.Process(contended.process.pid)
    assert contended.post("/api/generate", {"model": "one", "prompt": "a", "options": {"num_predict": 1}}).status_code == 200
    files = process.num_fds()
    group = [Client(contended, seed, things) for seed in range(clients)]
    for client in group:
        client.start()
    waits = [0.0]
    while any(client.is_alive() for client in group):
        start = time.monotonic()
        assert contended.get("/api/version")
        waits.append(time.monotonic() - start)
        time.sleep(0.1)
    seen = sum((client.seen for client in group), Counter[str]())
    stopping = sorted(seconds for client in group for seconds in client.stopping)
    print(seen, f"stops: {len(stopping)}, median {stopping[len(stopping) // 2]:.2f} s, most {stopping[-1]:.2f} s")
    print(f"the daemon answers after at most {max(waits):.2f} s")
    assert [problem for client in group for problem in client.failed] == []
    assert {key for key in seen if key.startswith(("embed", "copy", "look", "stop"))} <= {
        "embed: 2 vectors",
        "embed: the model was unloaded",
        "copy: 200",
        "look: 200",
        "stop: stopped",
    }
    assert {key for key in seen if key.startswith("delete")} <= {"delete: 200", "delete: 404"}
    assert seen["whole: whole"] > things and seen["leave: left"] > things // 2
    assert stopping[-1] < STOPPED and max(waits) < LATE
    for name in MODELS:
        contended.post("/api/generate", {"model": name, "keep_alive": 0})
    wait_for(lambda: engines(contended) == 0)
    answer = contended.post("/api/generate", {"model": "two", "prompt": "a", "stream": False, "options": {"num_predict": 2}})
    assert answer.json()["response"].split() == ["two0", "two1"]
    contended.seconds_until_idle()
    wait_for(lambda: process.num_fds() <= files + 2)
    assert "Traceback" not in contended.log.read_text()
