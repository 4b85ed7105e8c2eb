"""Clients that do not read, and engines that do not answer: nothing waits for them for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import ollama
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from ollamapy.server import connection
from ollamapy.server.connection import Connection
from tests.scripted import write_scripted
from tests.server.daemon import Daemon, request_bytes, running

STALLED = 1.5  # seconds, in place of a minute
_MAIN = f"""
from ollamapy.server import connection, library
from ollamapy.cli.main import main
connection.STALLED, library.STATS_TIMEOUT = {STALLED}, 0.5
main()
"""
LONG = {"model": "endless", "prompt": "a", "keep_alive": -1, "options": {"num_predict": 20000, "repeat_last_n": 0}}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Loads one model at a time, of two that never stop by themselves."""
    folder = tmp_path_factory.mktemp("impatient")
    command = (sys.executable, "-c", _MAIN, "serve")
    with running(folder / "models", folder / "log", command=command, OLLAMA_MAX_LOADED_MODELS="1") as daemon:
        with ollama.Client(daemon.url) as client:
            for name, letter in (("endless", "w"), ("other", "v")):
                # long words: 20,000 of them are more than the kernel keeps for a client that does not read
                path = write_scripted(folder / f"{name}.gguf", [f"\u2581{letter * 900}{n}" for n in range(100)], loop=True)
                client.create(name, files={"m.gguf": client.create_blob(path)})
        yield daemon


def unread(daemon: Daemon, path: str, body: object) -> socket.socket:
    """A request that is sent, of which no answer is ever read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", daemon.port))
    sock.sendall(request_bytes("POST", path, body))
    return sock


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
def test_a_client_that_does_not_read_is_cut_and_its_model_may_go(impatient: Daemon, path: str) -> None:
    impatient.post("/api/generate", {"model": "endless", "prompt": ""})
    with unread(impatient, path, {**LONG, "stream": True, "max_tokens": 20000}):
        deadline = time.monotonic() + 20
        while not impatient.engine()["requests"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer = impatient.post("/api/generate", {**LONG, "model": "other", "options": {"num_predict": 2}, "stream": False})
        assert answer.status_code == 200, answer.text
    assert "has read nothing for" in impatient.log.read_text()


def test_ps_does_not_wait_for_an_engine_that_is_stopped(impatient: Daemon) -> None:
    impatient.post("/api/generate", {"model": "other", "prompt": ""})
    pid = impatient.engine()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        stopped = impatient.engine()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert stopped["pid"] == pid and stopped["error"] == "the engine has not told its figures within 0.5 s"
    assert impatient.stats()["num_running"] == 0


def test_a_client_that_reads_slowly_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB in pieces, with pauses shorter than what is allowed, for several times as long as that."""
    monkeypatch.setattr(connection, "STALLED", 0.5)
    size, pieces = 1 << 20, 16

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (size * pieces))]})
        for number in range(pieces):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": number + 1 < pieces})

    async def main() -> tuple[int, float]:
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([listening]))
        start = time.monotonic()
        reader, writer = await asyncio.open_connection(*listening.getsockname(), limit=1 << 12)
        writer.write(request_bytes("GET", "/"))
        await reader.readuntil(b"\r\n\r\n")
        total = 0
        while total < size * pieces and (data := await reader.read(size)):
            before, total = total, total + len(data)
            if before // size < total // size:
                await asyncio.sleep(0.15)
        seconds = time.monotonic() - start
        writer.close()
        server.should_exit = True
        await serving
        return total, seconds

    total, seconds = asyncio.run(main())
    assert total == size * pieces and seconds > 3 * connection.STALLED
