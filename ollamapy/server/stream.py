"""Answers on the wire: one JSON object, newline-delimited JSON, or server-sent events. And what becomes of errors.

Before its first line an answer's error is an ordinary error with its status; after it, the error is the last line.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollamapy.api import openai
from ollamapy.api.types import Reply
from ollamapy.errors import OllamapyError, ServerBusy, Unauthorized

log = logging.getLogger(__name__)

QUIET = 15.0  # seconds of silence: as shipped, proxies cut a connection after 60 (nginx, AWS), 50 (HAProxy) or 30 (Google)
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
    """How the events of an answer are written: each one, that there is none yet, a failure in between, and the end."""

    media_type: str
    end = b""

    def line(self, event: T) -> bytes:
        raise NotImplementedError

    def alive(self, warning: str = "") -> bytes:
        """What adds nothing to the answer; nothing at all where the API has no such thing."""
        raise NotImplementedError

    def failure(self, error: OllamapyError) -> bytes:
        raise NotImplementedError


class NDJSON(Wire[Any]):
    """`empty` makes a line of an answer that has no text yet."""

    media_type = "application/x-ndjson"

    def __init__(self, empty: Callable[[], Reply] | None = None) -> None:
        self._empty = empty

    def line(self, event: Any) -> bytes:
        return json_line(event) + b"\n"

    def alive(self, warning: str = "") -> bytes:
        return self.line(msgspec.structs.replace(self._empty(), warning=warning)) if self._empty else b""

    def failure(self, error: OllamapyError) -> bytes:
        return _encode({"error": public_text(error)}) + b"\n"


class SSE(Wire[T]):
    """OpenAI's form of an answer; `chunks` makes its objects from an event. An error ends it without [DONE]. What begins with a
    colon is a comment, which clients pass over."""

    media_type = "text/event-stream"
    end = b"data: [DONE]\n\n"

    def __init__(self, chunks: Callable[[T], Sequence[Any]]) -> None:
        self._chunks = chunks

    def line(self, event: T) -> bytes:
        return b"".join(b"data: %s\n\n" % json_line(chunk) for chunk in self._chunks(event))

    def alive(self, warning: str = "") -> bytes:
        return f": {WARNING_HEADER}: {warning}\n\n".encode() if warning else b": keep-alive\n\n"

    def failure(self, error: OllamapyError) -> bytes:
        return b"data: %s\n\n" % _encode(openai.error(error, public_text(error)))


class Streamed(Response, Generic[T]):
    """`events` as they come. The status waits for the first of them, as what fails before it is an ordinary error; but not for
    longer than QUIET. From then on it says that it is alive after each QUIET without an event.

    `warnings` may be added to: what comes too late for the header follows. An answer of one event for which `single` holds is
    a plain JSON object.
    """

    def __init__(
        self,
        events: AsyncGenerator[T],
        wire: Wire[T],
        warnings: Sequence[str] = (),
        single: Callable[[T], bool] = lambda _: False,
    ) -> None:
        super().__init__(b"", 200, {"Cache-Control": "no-cache"}, wire.media_type)
        del self.headers["content-length"]
        self._events, self._wire, self._warnings, self._single = events, wire, warnings, single
        self._begun = False
        self._num_told = 0  # warnings
        self._last_write = time.monotonic()
        self._turn = asyncio.Lock()  # to write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        alive = asyncio.create_task(self._stay_alive(send))
        try:
            async with aclosing(self._events):
                last = await self._all_but_the_end(scope["path"], send)
                if isinstance(last, Response):
                    alive.cancel()  # or it would begin another while the events are closed
            if isinstance(last, Response):
                await last(scope, receive, send)
            else:
                await self._write(send, last, more=False)
        finally:
            alive.cancel()

    async def _all_but_the_end(self, path: str, send: Send) -> bytes | Response:
        """Writes the events; the end is what it returns, or, where nothing has been written, the whole answer."""
        try:
            async for event in self._events:
                if not self._begun and self._single(event):
                    return JSON(event, headers=warning_header(self._warnings))
                await self._write(send, self._wire.line(event))
            return self._wire.end
        except OllamapyError as error:
            if not self._begun:
                raise
            log.info("%s ended with an error: %s", path, error)
            return self._wire.failure(error)
        except Exception:
            if not self._begun:
                raise
            log.exception("%s failed", path)
            return self._wire.failure(OllamapyError(INTERNAL))

    async def _stay_alive(self, send: Send) -> None:
        while True:
            left = self._last_write + QUIET - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            elif data := self._wire.alive():
                await self._write(send, data)
            else:
                return

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        async with self._turn:
            told, self._num_told = self._num_told, len(self._warnings)
            begun, self._begun = self._begun, True
            if not begun:
                self.headers.update(warning_header(self._warnings))
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            elif late := self._warnings[told:]:
                data = self._wire.alive(_in_ascii(late)) + data
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._last_write = time.monotonic()


async def collected(events: AsyncIterator[T]) -> list[T]:
    return [event async for event in events]


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """The warnings in one header; none when there are none."""
    return {WARNING_HEADER: _in_ascii(warnings)} if warnings else {}


def _in_ascii(warnings: Sequence[str]) -> str:
    """Each once, in one line."""
    text = "; ".join(dict.fromkeys(warnings)).encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_WARNING]


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
