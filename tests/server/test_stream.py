"""What goes over the wire besides the answers: line breaks in JSON, warnings, errors after the first line, slow bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from ollamapy.api.types import GenerateResponse
from ollamapy.errors import BadRequest, EngineError, OllamapyError, TooLarge, TooSlow
from ollamapy.server import body, stream
from ollamapy.server.stream import (
    MAX_WARNING,
    NDJSON,
    SSE,
    WARNING_HEADER,
    Streamed,
    Wire,
    json_line,
    public_text,
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


def messages_of(response: Callable[[], Streamed[Any]]) -> list[Any]:
    """What it sends. Nothing may go on after it."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("the answer listens to nobody")

    async def run() -> None:
        await response()({"type": "http", "path": "/x"}, receive, send)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    return messages


def sent(wire: Wire[Any], failure: Exception | None) -> tuple[bytes, int, dict[bytes, bytes]]:
    """Body, status and headers of a streamed answer."""
    closed: list[bool] = []
    messages = messages_of(lambda: Streamed(events(failure, closed), wire, ["careful"]))
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
        messages_of(lambda: Streamed(failing(), NDJSON()))


async def slowly(warnings: list[str], failure: Exception | None = None) -> AsyncGenerator[dict[str, int]]:
    """Two events, each after three times as long as a stream may be quiet."""
    warnings.append("early")
    await asyncio.sleep(3 * stream.QUIET)
    warnings.append("late é")
    if failure is not None:
        raise failure
    yield {"n": 1}
    await asyncio.sleep(3 * stream.QUIET)
    yield {"n": 2}


def empty_line() -> GenerateResponse:
    return GenerateResponse(model="m", created_at="now", done=False, response="")


EMPTY = b'{"model":"m","created_at":"now","done":false,"response":""}\n'
LATE = b'{"model":"m","created_at":"now","done":false,"warning":"late \\\\xe9","response":""}\n'


@pytest.mark.parametrize(
    ("wire", "alive", "late", "lines"),
    [
        (SSE(lambda event: [event]), b": keep-alive\n\n", b": X-Ollamapy-Warning: late \\xe9\n\n", b"data: %s\n\n"),
        (NDJSON(empty_line), EMPTY, LATE, b"%s\n"),
    ],
)
def test_a_silent_stream_says_that_it_is_alive(
    monkeypatch: pytest.MonkeyPatch, wire: Wire[Any], alive: bytes, late: bytes, lines: bytes
) -> None:
    monkeypatch.setattr(stream, "QUIET", 0.2)
    told: list[str] = []
    start, *bodies = messages_of(lambda: Streamed(slowly(told), wire, told))
    assert start["status"] == 200 and dict(start["headers"])[WARNING_HEADER.lower().encode()] == b"early"
    texts = [body["body"] for body in bodies]
    first, second = texts.index(late + lines % b'{"n":1}'), texts.index(lines % b'{"n":2}')
    assert first in (1, 2, 3) and second - first in (2, 3, 4) and len(texts) == second + 2
    assert {*texts[:first], *texts[first + 1 : second]} == {alive}
    told.clear()
    start, *bodies = messages_of(lambda: Streamed(slowly(told, EngineError("it broke")), wire, told))
    assert start["status"] == 200 and b"it broke" in bodies[-1]["body"] and not bodies[-1]["more_body"]
    assert bodies[-1]["body"].startswith(late)


def test_a_stream_that_has_nothing_to_say_in_between_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "QUIET", 0.1)
    told: list[str] = []
    bodies = [m.get("body") for m in messages_of(lambda: Streamed(slowly(told), NDJSON(), told))]
    assert bodies == [None, b'{"n":1}\n', b'{"n":2}\n', b""]
    with pytest.raises(EngineError):
        messages_of(lambda: Streamed(slowly(told, EngineError("it broke")), NDJSON(), told))


def test_an_answer_of_one_event_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not late."""
    monkeypatch.setattr(stream, "QUIET", 0.5)

    async def one(seconds: float) -> AsyncGenerator[GenerateResponse]:
        await asyncio.sleep(seconds)
        yield msgspec.structs.replace(empty_line(), done=True)

    def answer(seconds: float) -> list[Any]:
        return messages_of(lambda: Streamed(one(seconds), NDJSON(empty_line), single=lambda line: line.done))

    start, body = answer(0.0)
    assert dict(start["headers"])[b"content-type"].startswith(b"application/json") and body["body"] == EMPTY[:-1].replace(
        b"false", b"true"
    )
    start, *bodies = answer(0.8)
    assert dict(start["headers"])[b"content-type"] == b"application/x-ndjson"
    assert [body["body"] for body in bodies] == [EMPTY, EMPTY.replace(b"false", b"true"), b""]


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
