"""A real `ollamapy serve` process with a home and a store of its own, and the real command line against it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ollamapy.api.address import Address
from ollamapy.api.client import Client
from ollamapy.errors import Unreachable

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "ollamapy"]
START_SECONDS = 30


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
    daemon = environment(home, free_port(), **variables)
    home.mkdir(parents=True, exist_ok=True)
    with open(daemon.log, "wb") as log:
        daemon.process = subprocess.Popen([*COMMAND, "serve"], env=daemon.environment, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_until_it_answers(daemon)
        yield daemon
    finally:
        daemon.process.send_signal(signal.SIGTERM)
        try:
            status = daemon.process.wait(20)
        except subprocess.TimeoutExpired:
            daemon.process.kill()
            daemon.process.wait()
            raise
    assert status == 0, daemon.log.read_text()


def wait_until_it_answers(daemon: Daemon) -> None:
    deadline = time.monotonic() + START_SECONDS
    with daemon.client() as client:
        while True:
            try:
                client.version()
                return
            except Unreachable:
                assert daemon.process is None or daemon.process.poll() is None, daemon.log.read_text()
                assert time.monotonic() < deadline, daemon.log.read_text()
                time.sleep(0.02)
