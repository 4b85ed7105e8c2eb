"""Requests that are brought to each phase of their life, for clients that leave then. The model's answers never end."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.server.daemon import Daemon, connect, request_bytes

MODEL = "endless"
SEATS = 4
OPTIONS = {"num_predict": 20000, "num_batch": SEATS, "repeat_last_n": 0}
LONG = {"model": MODEL, "prompt": "a", "options": OPTIONS}
SHORT = {**LONG, "options": {**OPTIONS, "num_predict": 40}}
TOKENIZE = {**LONG, "prompt": "a b " * 100_000}  # the daemon needs a second for its 400,000 tokens
PREFILL = {**LONG, "prompt": "a b " * 450, "options": {**OPTIONS, "num_ctx": 2048}}
SLOW = 10.0  # where the machine's speed is not in question


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
        seen, deadline = 0, time.monotonic() + SLOW
        while not seen or unsent(sock) != seen:
            assert time.monotonic() < deadline, f"{seen} bytes wait and the next is not there"
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
