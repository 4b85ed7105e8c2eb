"""Answers on the wire: one JSON object, newline-delimited JSON, or server-sent events. And what becomes of errors.

Before its first line an answer's error is an ordinary error with its status; after it, the error is the last line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollamapy.api import openai
from ollamapy.errors import OllamapyError, ServerBusy, Unauthorized

log = logging.getLogger(__name__)

WARNING_HEADER = "X-Ollamapy-Warning"
MAX_WARNING = 1024  # characters of the header
INTERNAL = "internal server error"
_BLOB_PATH = re.compile(r"/(?:[^\n]*?/)?blobs/(sha256-[0-9a-f]{12})[0-9a-f]{52}")
_encode = msgspec.json.encode
T = TypeVar("T")


class JSON(Response):
    media_type = "application/json; charset=utf-8"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(_encode(content), status, headers)


def json_line(value: Any) -> bytes:
    """JSON that no line reader breaks: Python's `splitlines`, which many clients use, ends lines at these characters too."""
    line = _encode(value)
    if b"\xe2\x80" in line or b"\xc2\x85" in line:
        for character in ("\x85", "\u2028", "\u2029"):
            line = line.replace(character.encode(), b"\\u%04x" % ord(character))
    return line


class Wire(Generic[T]):
    """How the events of an answer are written: each one, a failure in between, and the end."""

    media_type: str
    end = b""

    def line(self, event: T) -> bytes:
        raise NotImplementedError

    def failure(self, error: OllamapyError) -> bytes:
        raise NotImplementedError


class NDJSON(Wire[Any]):
    media_type = "application/x-ndjson"

    def line(self, event: Any) -> bytes:
        return json_line(event) + b"\n"

    def failure(self, error: OllamapyError) -> bytes:
        return _encode({"error": public_text(error)}) + b"\n"


class SSE(Wire[T]):
    """OpenAI's form of an answer; `chunks` makes its objects from an event. An error ends it without [DONE]."""

    media_type = "text/event-stream"
    end = b"data: [DONE]\n\n"

    def __init__(self, chunks: Callable[[T], Sequence[Any]]) -> None:
        self._chunks = chunks

    def line(self, event: T) -> bytes:
        return b"".join(b"data: %s\n\n" % json_line(chunk) for chunk in self._chunks(event))

    def failure(self, error: OllamapyError) -> bytes:
        return b"data: %s\n\n" % _encode(openai.error(error, public_text(error)))


class Streamed(Response, Generic[T]):
    """Sends `first`, which has been awaited already, and then the rest of `events` as they come."""

    def __init__(self, first: T, events: AsyncGenerator[T], wire: Wire[T], headers: Mapping[str, str]) -> None:
        super().__init__(b"", 200, {"Cache-Control": "no-cache", **headers}, wire.media_type)
        del self.headers["content-length"]
        self._first, self._events, self._wire = first, events, wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await write(self._wire.line(self._first))
                async for event in self._events:
                    await write(self._wire.line(event))
                last = self._wire.end
            except OllamapyError as error:
                log.info("%s ended with an error: %s", scope["path"], error)
                last = self._wire.failure(error)
            except Exception:
                log.exception("%s failed", scope["path"])
                last = self._wire.failure(OllamapyError(INTERNAL))
        await write(last, more=False)


async def streamed(
    events: AsyncGenerator[T], wire: Wire[T], warnings: Sequence[str] = (), single: Callable[[T], bool] = lambda _: False
) -> Response:
    """A streamed answer once its first event is there. One for which `single` holds is sent as a plain JSON object.

    `warnings` may still be added to until the first event comes.
    """
    first = await anext(events)
    if single(first):
        await events.aclose()
        return JSON(first, headers=warning_header(warnings))
    return Streamed(first, events, wire, warning_header(warnings))


async def collected(events: AsyncIterator[T]) -> list[T]:
    return [event async for event in events]


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """The warnings in one header, each once, ASCII only; none when there are none."""
    text = "; ".join(dict.fromkeys(warnings)).encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text)
    return {WARNING_HEADER: text[:MAX_WARNING]} if text else {}


def public_text(error: OllamapyError) -> str:
    """An error's text without where on this machine the store is: of a blob's path only its short name stays."""
    return _BLOB_PATH.sub(r"\1", str(error))


def error_response(path: str, error: OllamapyError) -> Response:
    """In the form of the API that the path belongs to."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else {}
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    text = public_text(error)
    body = openai.error(error, text) if path.startswith("/v1/") else {"error": text}
    return JSON(body, error.status, headers)
