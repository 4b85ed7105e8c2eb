"""A real daemon on a free port, what the tests of the server ask it, and raw HTTP over sockets to it."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import SERVE, Serving, free_port


class Daemon(Serving):
    """With a store of its own in the folder `models`. `headers` go with every request."""

    headers: Mapping[str, str] = {}

    def __init__(self, models: Path, log: Path, port: int = 0, command: tuple[str, ...] = SERVE, **variables: str) -> None:
        port = port or free_port()
        own = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(models)}
        super().__init__(log, {**os.environ, **own, **variables}, port, command)

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=30, trust_env=False, headers=self.headers).json()

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> httpx.Response:
        given = {**self.headers, **(headers or {})}
        return httpx.post(self.url + path, json=body, timeout=120, trust_env=False, headers=given)

    def engine(self) -> dict[str, Any]:
        """The one loaded engine, as `ps` with verbose has it."""
        (row,) = self.get("/api/ps?verbose=1")["models"]
        found: dict[str, Any] = row["engine"]
        return found

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.engine()["stats"]
        return found

    def seconds_until_idle(self, limit: float = 10) -> float:
        """How long until the engine has no sequence and every block is back; then its books must balance."""
        start = time.monotonic()
        while True:
            stats = self.stats()
            if stats["num_running"] == stats["num_waiting"] == stats["used_blocks"] == 0:
                break
            assert time.monotonic() - start < limit, stats
            time.sleep(0.005)
        assert stats["free_blocks"] + stats["cached_blocks"] == stats["total_blocks"] and stats["integrity"] == "ok", stats
        return time.monotonic() - start


@contextmanager
def running(models: Path, log: Path, port: int = 0, command: tuple[str, ...] = SERVE, **variables: str) -> Iterator[Daemon]:
    daemon = Daemon(models, log, port, command, **variables)
    try:
        yield daemon
    finally:
        daemon.stop()


def request_bytes(method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> bytes:
    """A request as it goes over the wire; a header with the value "-" is left out."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Host": "localhost", "Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value != "-")]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def connect(daemon: Daemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=60)


def leave(sock: socket.socket, how: str, seconds: float | None = None) -> None:
    """Ends a connection: "close", "reset", or "half-close", which is all, or has it closed after so many seconds."""
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how == "half-close":
        sock.shutdown(socket.SHUT_WR)
        if seconds is None:
            return
        time.sleep(seconds)
    sock.close()


def read_head(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case, and what came behind them."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = sock.recv(65536)
        assert chunk, f"the connection was closed after {data!r}"
        data += chunk
    head, rest = data.split(b"\r\n\r\n", 1)
    status, *fields = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
    return int(status.split()[1]), headers, rest
