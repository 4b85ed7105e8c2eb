"""Servers under measurement, started for it and stopped after it: our daemon in a home of its own, and llama-server."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.llama_cpp import PeerError
from tests import daemon

NAME = "bench"
CONTEXT = 1024  # tokens of each user
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Running:
    """`first_token_s`: our daemon from a request for a model that is not loaded, llama-server from its start."""

    url: str
    model: str
    first_token_s: float
    daemon: daemon.Daemon | None = None

    def eval_rate(self) -> float:
        """Tokens/s that `run --verbose` reports: the median of three single-user answers."""
        assert self.daemon is not None
        rates = []
        for number in range(3):
            done = self.daemon.cli("run", self.model, "--verbose", f"Write a long story about a journey, version {number}.")
            found = re.search(r"^eval rate:\s+([0-9.]+)", done.stdout + done.stderr, re.MULTILINE)
            if found is None:
                raise RuntimeError(f"no eval rate in: {done.stderr[-500:]}")
            rates.append(float(found.group(1)))
        return statistics.median(rates)


@contextmanager
def ours(folder: Path, model: Path, threads: int) -> Iterator[Running]:
    """A daemon that has the model created and loaded, with the thread count as one of its parameters."""
    with daemon.running(folder, OLLAMA_CONTEXT_LENGTH=str(CONTEXT), OLLAMA_KEEP_ALIVE="-1") as running:
        modelfile = folder / "Modelfile"
        modelfile.write_text(f"FROM {model}\nPARAMETER num_thread {threads}\nPARAMETER num_predict 128\n")
        running.ok("create", NAME, "-f", str(modelfile))
        url = f"http://{running.host}"
        options = {"num_predict": 1, "temperature": 0}
        request = {"model": NAME, "prompt": "Hello", "stream": False, "options": options}
        yield Running(url, NAME, timed_answer(f"{url}/api/generate", request), running)


@contextmanager
def llama(folder: Path, model: Path, threads: int, users: int) -> Iterator[Running]:
    """llama-server with a slot for each user."""
    port = daemon.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(folder / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-fa", "on"]
    command += ["-np", str(users), "-c", str(users * CONTEXT), "-t", str(threads), "-tb", str(threads), "-ngl", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_healthy(url, process)
        request = {"prompt": "Hello", "n_predict": 1, "temperature": 0}
        timed_answer(f"{url}/completion", request)
        yield Running(url, model.name, time.perf_counter() - start)
    finally:
        process.terminate()
        process.wait(20)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    raise PeerError(f"llama-server did not come up (status {process.poll()})")


def timed_answer(url: str, request: dict[str, Any]) -> float:
    """Seconds until the whole answer of one token is there."""
    start = time.perf_counter()
    httpx.post(url, json=request, timeout=START_SECONDS, trust_env=False).raise_for_status()
    return time.perf_counter() - start
