"""SIGKILL of a daemon that works: another serves from the same port and store at once, and no process of the first is left."""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from bench import fake_engine
from ollamapy.store.library import Library
from tests.daemon import SERVE, free_port
from tests.lifecycle.fakes import descendants, exists, wait_until
from tests.scripted import write_scripted
from tests.server.counting import SERVE as COUNTING
from tests.server.daemon import Daemon, request_bytes


class Load:
    """What clients do until the daemon is gone: streams of two models, and changes of the store. `known` gets the models that
    must be there (True) or not (False) afterwards: what was answered, and nothing of what was not."""

    def __init__(self, daemon: Daemon, blob: bytes, number: int, known: dict[str, bool]) -> None:
        self.daemon, self.blob, self.number, self.known = daemon, blob, number, known
        self.sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=work) for work in (self._models, self._uploads, self._streams)]
        for thread in self._threads:
            thread.start()

    def _models(self) -> None:
        """Copies, over each other and anew, and deletes."""
        with httpx.Client(base_url=self.daemon.url, timeout=30, trust_env=False) as client:
            for step in range(10**6):
                name = f"copy-{step % 5}"
                try:
                    if not self.known.get(name, True):
                        del self.known[name]
                    client.post("/api/copy", json={"source": "kept", "destination": name}).raise_for_status()
                    self.known[name] = True
                    if step % 3 == 0:
                        del self.known[name]
                        client.request("DELETE", "/api/delete", json={"model": name}).raise_for_status()
                        self.known[name] = False
                except httpx.TransportError:
                    return

    def _uploads(self) -> None:
        """Models of new blobs, which replace each other."""
        with httpx.Client(base_url=self.daemon.url, timeout=30, trust_env=False) as client:
            for step in range(10**6):
                content = self.blob + f"{self.number} {step}".encode()  # what follows the tensors is nobody's
                digest, name = f"sha256:{sha256(content).hexdigest()}", f"made-{step % 5}"
                try:
                    client.post(f"/api/blobs/{digest}", content=content).raise_for_status()
                    body = {"model": name, "files": {"m.gguf": digest}, "stream": False}
                    client.post("/api/create", json=body).raise_for_status()
                    self.known[name] = True
                except httpx.TransportError:
                    return

    def _streams(self) -> None:
        """On both APIs, of two models, so that one may be loading."""
        body = {"model": "kept", "prompt": "a", "options": {"num_predict": 100000}}
        other = {"model": "second", "prompt": "a", "max_tokens": 1000, "stream": True}
        for path, asked in (("/api/generate", body), ("/api/generate", body), ("/v1/completions", other)):
            try:
                sock = socket.create_connection(("127.0.0.1", self.daemon.port), timeout=60)
                self.sockets.append(sock)
                sock.sendall(request_bytes("POST", path, asked))
            except OSError:
                return

    def end(self) -> None:
        """Once the daemon is dead: each stream is closed by that."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for sock in self.sockets:
            try:
                while sock.recv(1 << 20):
                    pass
            except ConnectionResetError:
                pass
            sock.close()


def names(daemon: Daemon) -> set[str]:
    return {row["name"].removesuffix(":latest") for row in daemon.get("/api/tags")["models"]}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("counting", "kills"),
    [(False, 1), (True, 1), pytest.param(False, 40, marks=pytest.mark.slow), pytest.param(True, 160, marks=pytest.mark.slow)],
)
def test_a_killed_daemon_is_followed_by_another_on_its_port(tmp_path: Path, counting: bool, kills: int) -> None:
    rng, models, port = random.Random(6), tmp_path / "models", free_port()
    if counting:
        fake_engine.write_model(tmp_path / "m.gguf")
    else:
        write_scripted(tmp_path / "m.gguf", [f"\u2581w{n}" for n in range(100)], loop=True)
    blob = (tmp_path / "m.gguf").read_bytes()

    def start(number: int) -> Daemon:
        return Daemon(models, tmp_path / f"log{number}", port, COUNTING if counting else SERVE)

    known: dict[str, bool] = {}
    gone, back, processes = [], [], []
    daemon = start(0)
    try:
        for name in ("kept", "second"):
            content = blob + name.encode()
            digest = f"sha256:{sha256(content).hexdigest()}"
            httpx.post(f"{daemon.url}/api/blobs/{digest}", content=content, trust_env=False).raise_for_status()
            daemon.post("/api/create", {"model": name, "files": {"m.gguf": digest}, "stream": False}).raise_for_status()
            known[name] = True
        for number in range(kills):
            load = Load(daemon, blob, number, known)
            time.sleep(rng.random() * (1.0 if counting else 4.0))  # torch is imported in that time
            os.kill(daemon.process.pid, signal.SIGSTOP)  # so that the list is complete
            left = descendants(daemon.process.pid)
            processes.append(len(left))
            os.kill(daemon.process.pid, signal.SIGKILL)
            killed = time.monotonic()
            with ThreadPoolExecutor(1) as pool:
                gone_after = pool.submit(wait_until, lambda left=left: not any(map(exists, left)), 1.0 if kills > 9 else 10.0)
                daemon.process.wait()
                daemon = start(number + 1)
                back.append(time.monotonic() - killed)
                gone.append(gone_after.result())
            assert daemon.process.poll() is None, daemon.log.read_text()
            load.end()
            there = names(daemon)
            assert {name for name, is_there in known.items() if is_there} <= there
            assert not {name for name, is_there in known.items() if not is_there} & there
            asked = {"model": "kept", "prompt": "a", "stream": False, "options": {"num_predict": 2}}
            answer = daemon.post("/api/generate", asked)
            assert answer.status_code == 200 and answer.json()["eval_count"] == 2, answer.text
    finally:
        daemon.stop()
    library = Library(models)
    assert library.check(deep=True) == []
    library.close()
    for name, times in (("no process is left", gone), ("it answers again", back)):
        print(f"until {name}: median {statistics.median(times):.2f} s, most {max(times):.2f} s")
    assert max(processes) >= (3 if kills > 9 else 1), "some came late enough to meet a forkserver and two engines"
