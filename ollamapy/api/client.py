"""The client of a running server: asynchronous over httpx, and a thin synchronous form of it for the command line.

Every failure is an OllamapyError: the server's own text under the class that its status stands for, or `Unreachable`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ollamapy.api.address import Address
from ollamapy.api.types import (
    ChatRequest,
    ChatResponse,
    CopyRequest,
    CreateRequest,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    ListedModel,
    ListResponse,
    ModelRequest,
    Progress,
    RunningModel,
    RunningResponse,
    ShowResponse,
)
from ollamapy.errors import (
    BadRequest,
    ClientGone,
    Forbidden,
    NotFound,
    NotSupported,
    OllamapyError,
    ServerBusy,
    TooLarge,
)

if TYPE_CHECKING:
    import httpx

_CHUNK = 1 << 20
_CONNECT_SECONDS = 10.0
_CLASSES = {kind.status: kind for kind in (BadRequest, Forbidden, NotFound, TooLarge, ClientGone, NotSupported, ServerBusy)}
T = TypeVar("T")


class Unreachable(OllamapyError):
    """No server answers at the address."""


class Client(AbstractAsyncContextManager["Client"]):
    """Belongs to one event loop. Without a time limit: a model may take long to load and to answer."""

    def __init__(self, address: Address) -> None:
        import httpx  # 80 ms, which `--help` need not pay

        self.address = address
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._http = httpx.AsyncClient(base_url=address.url, timeout=timeout, trust_env=False)
        self._failure = httpx.HTTPError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def version(self) -> str:
        answer = await self._ask("GET", "/api/version", dict[str, str])
        return answer["version"]

    async def tags(self) -> list[ListedModel]:
        return (await self._ask("GET", "/api/tags", ListResponse)).models

    async def ps(self, *, verbose: bool = False) -> list[RunningModel]:
        """`verbose`: with what each engine is and does."""
        return (await self._ask("GET", f"/api/ps?verbose={int(verbose)}", RunningResponse)).models

    async def show(self, model: str, *, verbose: bool = False) -> ShowResponse:
        return await self._ask("POST", "/api/show", ShowResponse, ModelRequest(model=model, verbose=verbose))

    async def copy(self, source: str, destination: str) -> None:
        await self._send("POST", "/api/copy", CopyRequest(source=source, destination=destination))

    async def delete(self, model: str) -> None:
        await self._send("DELETE", "/api/delete", ModelRequest(model=model))

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        return await self._ask("POST", "/api/embed", EmbedResponse, request)

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateResponse]:
        """Lines as they come; a request with `stream` false gives one."""
        return self._lines("/api/generate", request, GenerateResponse)

    def chat(self, request: ChatRequest) -> AsyncIterator[ChatResponse]:
        """As `generate`."""
        return self._lines("/api/chat", request, ChatResponse)

    def create(self, request: CreateRequest) -> AsyncIterator[Progress]:
        """Files must have been uploaded before."""
        return self._lines("/api/create", request, Progress)

    async def load(self, model: str, keep_alive: float | str | None = None) -> None:
        """Loads a model; with `keep_alive` 0 unloads it."""
        async for _ in self.generate(GenerateRequest(model=model, keep_alive=keep_alive, stream=False)):
            pass

    async def has_blob(self, digest: str) -> bool:
        """`digest` is sha256:<hex>."""
        try:
            await self._send("HEAD", f"/api/blobs/{digest}")
        except NotFound:
            return False
        return True

    async def upload(self, digest: str, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Sends a file unless the server has it. `progress` gets the bytes sent and all there are."""
        if await self.has_blob(digest):
            return
        total = path.stat().st_size

        async def content() -> AsyncIterator[bytes]:
            sent = 0
            with path.open("rb") as file:
                while chunk := await asyncio.to_thread(file.read, _CHUNK):
                    yield chunk
                    sent += len(chunk)
                    progress(sent, total)

        await self._send("POST", f"/api/blobs/{digest}", content=content(), headers={"Content-Length": str(total)})

    # --- requests ---

    async def _ask(self, method: str, path: str, type: type[T], body: Any = None) -> T:
        response = await self._send(method, path, body)
        return msgspec.json.decode(response.content, type=type)

    async def _send(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        if body is not None:
            more = {"content": msgspec.json.encode(body), "headers": {"Content-Type": "application/json"}}
        try:
            response = await self._http.request(method, path, **more)
        except self._failure as error:
            raise self._unreachable(error) from error
        _check(response.status_code, response.content)
        return response

    async def _lines(self, path: str, body: Any, type: type[T]) -> AsyncIterator[T]:
        decoder = msgspec.json.Decoder(type)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.stream("POST", path, content=msgspec.json.encode(body), headers=headers) as response:
                if response.status_code >= 400:
                    _check(response.status_code, await response.aread())
                pending = b""
                async for chunk in response.aiter_bytes():
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        yield _line(line, decoder)
                if pending:
                    yield _line(pending, decoder)
        except self._failure as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        reason = str(error) or type(error).__name__
        return Unreachable(f"could not connect to a running server at {self.address.url}: {reason}")


class SyncClient:
    """`Client` for programs without an event loop: `call` runs one of its coroutines, `each` iterates over an answer."""

    def __init__(self, address: Address) -> None:
        self._runner = asyncio.Runner()
        self.client = self._runner.run(_made(address))

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self.client.__aexit__(None, None, None))
        self._runner.close()

    def call(self, work: Awaitable[T]) -> T:
        """Ctrl+C cancels the work and raises KeyboardInterrupt."""
        return self._runner.run(_awaited(work))

    def each(self, lines: AsyncIterator[T]) -> Iterator[T]:
        """Leaving the loop early closes the answer's connection, which ends the generation."""
        try:
            while True:
                try:
                    yield self.call(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            close = getattr(lines, "aclose", None)
            if close is not None:
                self.call(close())


async def _made(address: Address) -> Client:
    return Client(address)


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def _line(line: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """An object of an answer. Raises the error that a last line reports."""
    if line.startswith(b'{"error"'):
        raise OllamapyError(_error_text(line))
    return decoder.decode(line)


def _check(status: int, content: bytes) -> None:
    if status < 400:
        return
    kind = _CLASSES.get(status)
    raise (kind or OllamapyError)(_error_text(content) or f"the server answered with status {status}")


def _error_text(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content, type=dict[str, Any])["error"])
    except (msgspec.DecodeError, KeyError):
        return content.decode(errors="replace").strip()
