"""Clients that do not read, and engines that do not answer: nothing waits for them for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ollama
import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from ollamapy.server import connection
from ollamapy.server.connection import Connection
from tests.scripted import write_scripted
from tests.server.daemon import Daemon, request_bytes, running

_MAIN = """
from ollamapy.server import connection, library
from ollamapy.cli.main import main
connection.STALLED, library.STATS_TIMEOUT = {}, 0.5
main()
"""
LONG = {"model": "endless", "prompt": "a", "keep_alive": -1, "options": {"num_predict": 20000, "repeat_last_n": 0}}
SHORT = {**LONG, "stream": False, "options": {"num_predict": 300, "repeat_last_n": 0}}


@contextmanager
def daemon_that_cuts(folder: Path, after: float, letters: int) -> Iterator[Daemon]:
    """After so many seconds in place of a minute. Loads one model at a time, of two that never stop and have words of so many
    letters."""
    command = (sys.executable, "-c", _MAIN.format(after), "serve")
    with running(folder / "models", folder / "log", command=command, OLLAMA_MAX_LOADED_MODELS="1") as daemon:
        with ollama.Client(daemon.url) as client:
            for name, letter in (("endless", "w"), ("other", "v")):
                # their answers are more than the kernel keeps for a client that does not read
                path = write_scripted(folder / f"{name}.gguf", [f"\u2581{letter * letters}{n}" for n in range(100)], loop=True)
                client.create(name, files={"m.gguf": client.create_blob(path)})
        yield daemon


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon_that_cuts(tmp_path_factory.mktemp("impatient"), 1.5, 900) as daemon:
        yield daemon


def unread(daemon: Daemon, path: str, body: object) -> socket.socket:
    """A request that is sent, with little room for an answer that nobody reads."""
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


def tokens_a_second(daemon: Daemon) -> float:
    """Of one client that reads, at its best."""
    answers = [daemon.post("/api/generate", SHORT).json() for _ in range(12)]
    return max(answer["eval_count"] / answer["eval_duration"] * 1e9 for answer in answers)


@pytest.mark.slow
def test_a_hundred_slow_readers_cost_others_nothing(tmp_path: Path) -> None:
    """Half of them read a byte a second, half nothing. Their generations have ended: 7 MB for each, most of it unread."""
    body = {**LONG, "options": {**LONG["options"], "num_predict": 800}}  # type: ignore[dict-item]
    stop = threading.Event()
    with daemon_that_cuts(tmp_path, 40, 9000) as daemon, ExitStack() as open_sockets:
        alone = tokens_a_second(daemon)
        process = psutil.Process(daemon.process.pid)
        before = process.memory_info().rss
        sockets = [open_sockets.enter_context(unread(daemon, "/api/generate", body)) for _ in range(100)]

        def trickle() -> None:
            while not stop.wait(1.0):
                for sock in sockets[:50]:
                    with suppress(OSError):
                        sock.recv(1)

        reading = threading.Thread(target=trickle)
        reading.start()
        try:
            deadline = time.monotonic() + 150
            while daemon.engine()["requests"] < 100:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            while (stats := daemon.stats())["num_running"] or stats["num_waiting"]:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            stuck = daemon.engine()["requests"]
            beside = tokens_a_second(daemon)
            grown = (process.memory_info().rss - before) / 100 / 800 / 9000
            print(f"{stuck} stuck, {alone:.0f} tokens/s alone, {beside:.0f} beside them, {grown:.2f} of their text in memory")
            assert stuck > 0 and beside >= 0.95 * alone and grown < 3  # as text, as a line, as bytes
            while daemon.engine()["requests"]:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            stop.set()
            reading.join()
