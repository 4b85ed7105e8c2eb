"""A real `ollamapy serve` process, and the real command line against one with a home and a store of its own."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from ollamapy.api.address import Address
from ollamapy.api.client import Client

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "ollamapy"]
SERVE = (*COMMAND, "serve")
START_SECONDS = 30

# Whoever starts servers ends them when it is ended: SIGTERM unwinds as Ctrl-C does, or they would be left as orphans.
signal.signal(signal.SIGTERM, signal.default_int_handler)


class Serving:
    """A daemon's process, which answers or has ended. `work_to_answer`: seconds of its own processor time until it answered
    /api/version first."""

    def __init__(
        self, log: Path, environment: Mapping[str, str], port: int, command: tuple[str, ...] = SERVE, cwd: Path = ROOT
    ) -> None:
        self.log, self.port = log, port
        self.url = f"http://127.0.0.1:{port}"
        start = time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env=environment)
        while self.process.poll() is None and not self.answers():
            assert time.monotonic() - start < START_SECONDS, log.read_text()
            time.sleep(0.01)
        self.work_to_answer = math.inf
        if self.process.poll() is None:
            used = psutil.Process(self.process.pid).cpu_times()
            self.work_to_answer = used.user + used.system

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/version", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        """The exit status; it is killed when it does not end by itself."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclass
class Daemon:
    host: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.home / "serve.log"

    def client(self) -> Client:
        return Client(Address.parse(self.host))

    def cli(self, *args: str, input: str | None = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Runs `ollamapy args` to its end. No terminal: stdin is `input`."""
        return subprocess.run(
            [*COMMAND, *args], input=input, capture_output=True, text=True, env=self.environment, cwd=cwd, timeout=60
        )

    def ok(self, *args: str, input: str | None = "", cwd: Path = ROOT) -> str:
        """The standard output of a command that must succeed."""
        done = self.cli(*args, input=input, cwd=cwd)
        assert done.returncode == 0, f"{args}: {done.stderr}\n{self.log.read_text()[-2000:]}"
        return done.stdout


def environment(home: Path, port: int, **variables: str) -> Daemon:
    """Addresses and variables for a daemon that is not started yet."""
    host = f"127.0.0.1:{port}"
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS", "PYTHONWARNINGS") if name in os.environ}
    own = {"HOME": str(home), "OLLAMA_HOST": host, "PYTHONPATH": str(ROOT), "OLLAMAPY_DEVICE": "cpu"}
    own["OLLAMAPY_PREFIX_CACHE_BYTES"] = "0"
    own["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # where kernels that were built lie
    return Daemon(host, home, {**kept, **own, **variables})


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


@contextmanager
def running(home: Path, **variables: str) -> Iterator[Daemon]:
    """A daemon that answers; ends it by SIGTERM, which must work."""
    port = free_port()
    daemon = environment(home, port, **variables)
    home.mkdir(parents=True, exist_ok=True)
    serving = Serving(daemon.log, daemon.environment, port)
    daemon.process = serving.process
    try:
        assert serving.process.poll() is None, daemon.log.read_text()
        yield daemon
    finally:
        status = serving.stop()
    assert status == 0, daemon.log.read_text()
