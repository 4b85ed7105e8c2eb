"""Streams that have nothing to say for long: no proxy cuts them, official clients read over it, errors still get through."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ollama
import openai
import psutil
import pytest

from tests.scripted import write_scripted
from tests.server.daemon import Daemon, connect, read_head, request_bytes, running
from tests.server.phases import forkserver_of, wait_for

QUIET = 0.4
_MAIN = f"""
from ollamapy.server import stream
from ollamapy.cli.main import main
stream.QUIET = {QUIET}
main()
"""
MODEL, SEATS = "endless", 2
OPTIONS = {"num_predict": 20000, "num_batch": SEATS, "repeat_last_n": 0}
LONG = {"model": MODEL, "prompt": "a", "options": OPTIONS}
FEW = {**OPTIONS, "num_predict": 3}
SHORT = {**LONG, "options": FEW}
FEW_SEATS = {"num_batch": SEATS, "repeat_last_n": 0}
OPENAI = {"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": True, "options": FEW_SEATS}
ALIVE = b": keep-alive\n\n"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Says that it is alive after 0.4 seconds in place of 15."""
    folder = tmp_path_factory.mktemp("quiet")
    path = write_scripted(folder / "m.gguf", [f"\u2581w{n}" for n in range(100)], loop=True)
    command = (sys.executable, "-c", _MAIN, "serve")
    with running(folder / "models", folder / "log", command=command, OLLAMA_KEEP_ALIVE="-1") as daemon:
        with ollama.Client(daemon.url) as client:
            client.create(MODEL, files={"m.gguf": client.create_blob(path)})
        yield daemon


@contextmanager
def occupied(daemon: Daemon) -> Iterator[Callable[[], None]]:
    """All seats are taken by answers that do not end, until what this gives is called."""
    daemon.post("/api/generate", {**LONG, "prompt": ""})
    with ExitStack() as held:
        for _ in range(SEATS):
            sock = held.enter_context(connect(daemon))
            sock.sendall(request_bytes("POST", "/api/generate", LONG))
        wait_for(lambda: daemon.stats()["num_running"] == SEATS)
        yield held.close
    wait_for(lambda: not daemon.stats()["num_running"])


@contextmanager
def slow_load(daemon: Daemon) -> Iterator[Callable[[], None]]:
    """The model is not loaded, and a load does not go on until what this gives is called."""
    assert daemon.post("/api/generate", {"model": MODEL, "keep_alive": 0}).status_code == 200
    process = forkserver_of(daemon)
    wait_for(lambda: not process.children())
    process.suspend()
    try:
        yield process.resume
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


WAITS = pytest.mark.parametrize("waits", [occupied, slow_load])


def sent(daemon: Daemon, path: str, body: object) -> socket.socket:
    sock = connect(daemon)
    sock.sendall(request_bytes("POST", path, body))
    return sock


def rest(sock: socket.socket, begin: bytes) -> bytes:
    """The content of a chunked answer to its end."""
    data = begin
    while not data.endswith(b"0\r\n\r\n"):
        data += sock.recv(65536)
    content = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        content, data = content + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return content


@WAITS
def test_comments_until_there_is_something_to_say(quiet: Daemon, waits: Any) -> None:
    with waits(quiet) as go_on, sent(quiet, "/v1/completions", OPENAI) as sock:
        begin = time.monotonic()
        status, headers, data = read_head(sock)
        assert status == 200 and headers["content-type"].startswith("text/event-stream") and headers["x-request-id"]
        assert time.monotonic() - begin > QUIET / 2 and "x-queue-time-ms" not in headers
        while data.count(ALIVE) < 3:
            data += sock.recv(4096)
        assert time.monotonic() - begin > 2 * QUIET
        go_on()
        content = rest(sock, data)
    *parts, end, nothing = content.split(b"\n\n")
    chunks = [json.loads(part.removeprefix(b"data: ")) for part in parts if part != ALIVE.strip()]
    assert parts[:3] == [ALIVE.strip()] * 3 and (end, nothing) == (b"data: [DONE]", b"")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).split() == ["w0", "w1", "w2"]


@WAITS
def test_official_clients_read_over_it(quiet: Daemon, waits: Any) -> None:
    def with_openai(chat: bool) -> str:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "stream": True, "extra_body": {"options": FEW_SEATS}}
        with openai.OpenAI(base_url=quiet.url + "/v1", api_key="any", max_retries=0) as api:
            if chat:
                made = api.chat.completions.create(messages=[{"role": "user", "content": "a"}], n=2, **asked)
                return "".join(c.choices[0].delta.content or "" for c in made if c.choices and not c.choices[0].index)
            return "".join(c.choices[0].text for c in api.completions.create(prompt="a", **asked))

    def with_ollama(chat: bool) -> str:
        with ollama.Client(quiet.url) as client:
            if chat:
                messages = [{"role": "user", "content": "a"}]
                lines = list(client.chat(MODEL, messages, stream=True, options=FEW))
                assert lines[0].message.content == "" and not lines[0].done and lines[-1].eval_count == 3
                return "".join(line.message.content or "" for line in lines)
            answer = list(client.generate(MODEL, "a", stream=True, options=FEW))
            assert answer[0].response == "" and not answer[0].done and answer[-1].eval_count == 3
            return "".join(line.response for line in answer)

    with waits(quiet) as go_on, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, chat) for ask in (with_openai, with_ollama) for chat in (False, True)]
        time.sleep(3 * QUIET)
        go_on()
        assert [answer.result(20).split() for answer in answers] == [["w0", "w1", "w2"]] * 4


def test_an_answer_in_one_piece_waits_in_silence_and_keeps_its_status(quiet: Daemon) -> None:
    with occupied(quiet) as go_on, sent(quiet, "/api/generate", {**SHORT, "stream": False}) as sock:
        sock.settimeout(3 * QUIET)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(20)
        go_on()
        status, headers, _ = read_head(sock)
        assert status == 200 and float(headers["x-queue-time-ms"]) > 2000 * QUIET


def test_what_fails_late_is_an_error_in_the_stream(quiet: Daemon) -> None:
    """Of three requests that wait for one load: what fails at once has its status, and so has an answer in one piece."""
    assert quiet.post("/api/generate", {**LONG, "model": "not-here"}).status_code == 404
    with slow_load(quiet):
        with (
            sent(quiet, "/v1/completions", OPENAI) as comments,
            sent(quiet, "/api/generate", SHORT) as lines,
            sent(quiet, "/api/generate", {**SHORT, "stream": False}) as whole,
            openai.OpenAI(base_url=quiet.url + "/v1", api_key="any", max_retries=0) as api,
        ):
            began = [read_head(sock) for sock in (comments, lines)]
            with api.completions.create(model=MODEL, prompt="a", stream=True) as stream:
                os.kill(forkserver_of(quiet).pid, signal.SIGKILL)
                with pytest.raises(openai.APIError, match="the process that starts engines ended"):
                    list(stream)
            assert [status for status, _, _ in began] == [200, 200]
            *_, error, nothing = rest(comments, began[0][2]).split(b"\n\n")
            assert "ended with status" in json.loads(error.removeprefix(b"data: "))["error"]["message"] and not nothing
            *_, last = rest(lines, began[1][2]).splitlines()
            assert "ended with status" in json.loads(last)["error"]
            assert read_head(whole)[0] == 500
        wait_for(lambda: quiet.post("/api/generate", {**SHORT, "stream": False}).status_code == 200)


@WAITS
@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
def test_a_client_that_leaves_a_silent_stream(quiet: Daemon, waits: Any, path: str) -> None:
    def tasks() -> int:
        return int(quiet.get("/api/ps?verbose=1")["daemon"]["tasks"])

    with waits(quiet) as go_on:
        before = tasks()
        with sent(quiet, path, {**OPENAI, **SHORT}) as sock:
            assert read_head(sock)[0] == 200
        wait_for(lambda: tasks() <= before)
        go_on()
    assert quiet.post("/api/generate", {**SHORT, "stream": False}).json()["eval_count"] == 3
    quiet.seconds_until_idle()


def test_a_warning_that_comes_too_late_for_the_header(quiet: Daemon) -> None:
    far = {**SHORT, "options": {**FEW, "num_ctx": 1 << 20, "no_such_option": 1}}
    with (
        slow_load(quiet) as go_on,
        sent(quiet, "/v1/completions", {**OPENAI, "options": far["options"]}) as comments,
        sent(quiet, "/api/generate", far) as lines,
    ):
        began = [read_head(sock) for sock in (comments, lines)]
        go_on()
        contents = [rest(sock, data) for sock, (_, _, data) in zip((comments, lines), began, strict=True)]
    for _, headers, _ in began:
        assert "no_such_option" in headers["x-ollamapy-warning"] and "num_ctx" not in headers["x-ollamapy-warning"]
    assert b": X-Ollamapy-Warning: num_ctx: 1048576 is more than this model has here" in contents[0]
    (late,) = [line["warning"] for line in map(json.loads, contents[1].splitlines()) if "warning" in line]
    assert late.startswith("num_ctx: 1048576 is more")
