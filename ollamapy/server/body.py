"""Request bodies: read within limits of size and time that hold while the bytes come in, then decoded once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TypeVar

from starlette.requests import Request

from ollamapy.api.decode import decode
from ollamapy.errors import BadRequest, TooLarge, TooSlow
from ollamapy.server.record import current

MAX_JSON_BYTES = 32 << 20
CHUNK_TIMEOUT = 30.0  # seconds without a byte
MIN_RATE = 1024  # bytes per second, over all of the body once GRACE seconds have passed
GRACE = 10.0
_T = TypeVar("_T")


async def read(request: Request, type: type[_T]) -> _T:
    """The JSON body. Raises TooLarge, TooSlow, BadRequest."""
    check_length(request, MAX_JSON_BYTES)
    body = bytearray()
    async for chunk in chunks(request):
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise TooLarge(f"the request body is larger than {MAX_JSON_BYTES} bytes")
    current().body_bytes = len(body)
    return decode(body, type)


def check_length(request: Request, limit: int) -> None:
    """Refuses a body by the length that its header declares, before any of it is read."""
    length = declared_length(request)
    if length is not None and length > limit:
        raise TooLarge(f"the request body is larger than {limit} bytes")


def declared_length(request: Request) -> int | None:
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadRequest("invalid Content-Length")
    return int(text)


async def chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises TooSlow."""
    start, received = time.monotonic(), 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(CHUNK_TIMEOUT):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise TooSlow(f"no byte of the request body came for {CHUNK_TIMEOUT:g} s") from None
        if chunk is None:
            return
        received += len(chunk)
        elapsed = time.monotonic() - start
        if elapsed > GRACE and received < MIN_RATE * elapsed:
            raise TooSlow(f"the request body comes slower than {MIN_RATE} bytes per second")
        yield chunk
