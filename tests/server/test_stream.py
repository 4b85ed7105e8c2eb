"""What goes over the wire besides the answers: line breaks in JSON, warnings, errors after the first line, slow bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from ollamapy.errors import BadRequest, EngineError, OllamapyError, TooLarge, TooSlow
from ollamapy.server import body
from ollamapy.server.stream import (
    MAX_WARNING,
    NDJSON,
    SSE,
    WARNING_HEADER,
    Wire,
    json_line,
    public_text,
    streamed,
    warning_header,
)

DIGEST = "a" * 64


def test_no_line_reader_breaks_a_line() -> None:
    text = "".join(map(chr, range(0x20, 0x3000))) + "\n\r\x0b\x0c\x1c\x85\u2028\u2029é"
    line = json_line({"response": text}).decode()
    assert line.splitlines() == [line] and json.loads(line)["response"] == text


def test_warnings_become_one_ascii_header() -> None:
    assert warning_header([]) == {}
    header = warning_header(['a "é"\r\nX-Evil: 1', "日本"])[WARNING_HEADER]
    assert header.isascii() and "\r" not in header and "\n" not in header and header.startswith('a "\\xe9"')
    assert len(warning_header(["x" * 10000])[WARNING_HEADER]) == MAX_WARNING


def test_errors_do_not_tell_where_the_store_is() -> None:
    text = f"/home/jo's files/.ollama/models/blobs/sha256-{DIGEST}: version at offset 4: it is 9"
    assert public_text(BadRequest(text)) == f"sha256-{'a' * 12}: version at offset 4: it is 9"


async def events(failure: Exception | None, closed: list[bool]) -> AsyncGenerator[dict[str, int]]:
    try:
        yield {"n": 1}
        yield {"n": 2}
        if failure is not None:
            raise failure
    finally:
        closed.append(True)


def sent(wire: Wire[Any], failure: Exception | None) -> tuple[bytes, int, dict[bytes, bytes]]:
    """Body, status and headers of a streamed answer."""
    messages: list[Any] = []
    closed: list[bool] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("the answer listens to nobody")

    async def run() -> None:
        response = await streamed(events(failure, closed), wire, ["careful"])
        await response({"type": "http", "path": "/x"}, receive, send)

    asyncio.run(run())
    assert closed == [True] and [m.get("more_body") for m in messages[1:]] == [True] * (len(messages) - 2) + [False]
    return b"".join(m["body"] for m in messages[1:]), messages[0]["status"], dict(messages[0]["headers"])


@pytest.mark.parametrize(
    ("failure", "text"),
    [(EngineError("it broke"), "it broke"), (BadRequest("no"), "no"), (KeyError("secret /etc/x"), "internal server error")],
)
def test_an_error_after_the_first_line_is_the_last_line(failure: Exception, text: str) -> None:
    content, status, headers = sent(NDJSON(), failure)
    assert [json.loads(line) for line in content.splitlines()] == [{"n": 1}, {"n": 2}, {"error": text}]
    assert status == 200 and headers[WARNING_HEADER.lower().encode()] == b"careful" and b"content-length" not in headers
    content, _, headers = sent(SSE(lambda event: [event, event]), failure)
    *lines, last = content.decode().removesuffix("\n\n").split("\n\n")
    assert lines == ['data: {"n":1}', 'data: {"n":1}', 'data: {"n":2}', 'data: {"n":2}']
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == text
    assert headers[b"content-type"].startswith(b"text/event-stream")


def test_the_end_of_an_answer() -> None:
    assert sent(SSE(lambda event: [event]), None)[0].endswith(b'data: {"n":2}\n\ndata: [DONE]\n\n')
    assert sent(NDJSON(), None)[0] == b'{"n":1}\n{"n":2}\n'


def test_an_error_before_the_first_line_is_raised() -> None:
    async def failing() -> AsyncGenerator[int]:
        raise EngineError("no")
        yield 1

    with pytest.raises(EngineError):
        asyncio.run(streamed(failing(), NDJSON()))


def receive_body(chunks: list[bytes], pause: float = 0.0, length: int | None = None) -> bytes | OllamapyError:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    queue = list(chunks)

    async def receive() -> Any:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": queue.pop(0), "more_body": bool(queue)}

    async def run() -> bytes:
        request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
        body.check_length(request, body.MAX_JSON_BYTES)
        return b"".join([chunk async for chunk in body.chunks(request)])

    try:
        return asyncio.run(run())
    except OllamapyError as error:
        return error


def test_bodies_have_limits_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert receive_body([b"a", b"b", b"c"]) == b"abc"
    assert isinstance(receive_body([b"a"], length=body.MAX_JSON_BYTES + 1), TooLarge)
    monkeypatch.setattr(body, "CHUNK_TIMEOUT", 0.05)
    assert isinstance(receive_body([b"a"], pause=0.5), TooSlow)
    monkeypatch.setattr(body, "GRACE", 0.02)
    assert isinstance(receive_body([b"a"] * 20, pause=0.01), TooSlow)
    assert receive_body([b"a" * 1024] * 20, pause=0.005) == b"a" * 20480
