"""A client of Ollama's API over httpx, as the command line uses it. Knows nothing of terminals.

Synchronous: an event loop would add 50 ms of process time to each command, a third of it.

Every method raises an OllamapyError: that of the answer's status, with the server's text, or Unreachable. A stream that is
closed before its end closes its connection, and with that the server stops working on it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
import msgspec

from ollamapy import __version__, errors
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
    ListResponse,
    ModelRequest,
    Progress,
    RunningResponse,
    ShowResponse,
)

_T = TypeVar("_T")
_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 20
_AGENT = f"ollamapy/{__version__} ({platform.machine()} {platform.system().lower()}) Python/{platform.python_version()}"
_BY_STATUS: dict[int, type[errors.OllamapyError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    413: errors.TooLarge,
    501: errors.NotSupported,
}


class _Failure(msgspec.Struct):
    error: Any = None


class _Version(msgspec.Struct):
    version: str


class Client:
    """Use as a context manager, or `close` it. There is no limit on how long an answer takes: a model may be loading.

    `api_key`: for servers that ask for one.
    """

    def __init__(self, address: Address, api_key: str = "") -> None:
        self.address = address
        local = Address.parse(address.url).is_loopback
        authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=address.url,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            trust_env=not local,  # a proxy cannot reach this machine's loopback
            verify=address.scheme == "https",  # loading the certificates takes 20 ms
            headers={"User-Agent": _AGENT, "Content-Type": "application/json", **authorization},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def version(self) -> str:
        return self._ask("GET", "/api/version", _Version).version

    def tags(self) -> ListResponse:
        return self._ask("GET", "/api/tags", ListResponse)

    def ps(self, *, verbose: bool = False) -> RunningResponse:
        """`verbose` asks for the engines' figures, too; servers that know none leave them out."""
        return self._ask("GET", "/api/ps?verbose=true" if verbose else "/api/ps", RunningResponse)

    def show(self, request: ModelRequest) -> ShowResponse:
        return self._ask("POST", "/api/show", ShowResponse, request)

    def load(self, model: str, keep_alive: str | int | None = None) -> GenerateResponse:
        """Loads a model, or with `keep_alive=0` unloads it."""
        return self._ask(
            "POST", "/api/generate", GenerateResponse, GenerateRequest(model=model, keep_alive=keep_alive, stream=False)
        )

    def generate(self, request: GenerateRequest) -> Generator[GenerateResponse]:
        return self._stream("/api/generate", request, GenerateResponse)

    def chat(self, request: ChatRequest) -> Generator[ChatResponse]:
        return self._stream("/api/chat", request, ChatResponse)

    def embed(self, request: EmbedRequest) -> EmbedResponse:
        return self._ask("POST", "/api/embed", EmbedResponse, request)

    def create(self, request: CreateRequest) -> Generator[Progress]:
        return self._stream("/api/create", request, Progress)

    def copy(self, source: str, destination: str) -> None:
        self._send("POST", "/api/copy", CopyRequest(source=source, destination=destination))

    def delete(self, model: str) -> None:
        self._send("DELETE", "/api/delete", ModelRequest(model=model))

    def has_blob(self, digest: str) -> bool:
        try:
            self._send("HEAD", f"/api/blobs/{digest}")
        except errors.NotFound:
            return False
        return True

    def upload_blob(self, digest: str, path: Path, progress: Callable[[int, int], None]) -> None:
        """Sends the file; `progress` gets bytes sent and in all. BadRequest if its content has another digest."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
            with _translated(self.address):
                response = self._http.post(f"/api/blobs/{digest}", content=_read(file, size, progress), headers=headers)
        _check(response)

    def _ask(self, method: str, path: str, type: type[_T], request: msgspec.Struct | None = None) -> _T:
        return _decode(self._send(method, path, request).content, type)

    def _send(self, method: str, path: str, request: msgspec.Struct | None = None) -> httpx.Response:
        with _translated(self.address):
            response = self._http.request(method, path, content=None if request is None else msgspec.json.encode(request))
        _check(response)
        return response

    def _stream(self, path: str, request: msgspec.Struct, type: type[_T]) -> Generator[_T]:
        with _translated(self.address), self._http.stream("POST", path, content=msgspec.json.encode(request)) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in _lines(response.iter_bytes()):
                yield _decode(line, type)


def _read(file: BinaryIO, size: int, progress: Callable[[int, int], None]) -> Iterator[bytes]:
    sent = 0
    while chunk := file.read(_CHUNK):
        yield chunk
        sent += len(chunk)
        progress(sent, size)


def _decode(body: bytes, type: type[_T]) -> _T:
    try:
        failure = msgspec.json.decode(body, type=_Failure).error
        if failure is None:
            return msgspec.json.decode(body, type=type)
    except msgspec.DecodeError as error:
        raise errors.OllamapyError(f"the server's answer cannot be read: {error}") from error
    raise errors.OllamapyError(str(failure))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of NDJSON. httpx's own iterator also splits at U+2028 and its kin, which may stand in a JSON string."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from filter(bytes.strip, whole)
    if rest.strip():
        yield rest


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        text = str(msgspec.json.decode(response.content, type=_Failure).error or "")
    except msgspec.DecodeError:
        text = response.text.strip()
    text = text or f"{response.status_code} {response.reason_phrase}"
    if response.status_code == errors.ServerBusy.status:
        wait = response.headers.get("Retry-After", "")
        raise errors.ServerBusy(text, int(wait) if wait.isdecimal() else 1)
    raise _BY_STATUS.get(response.status_code, errors.OllamapyError)(text)


@contextmanager
def _translated(address: Address) -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise errors.Unreachable("could not connect to ollamapy server, run 'ollamapy serve' to start it") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise errors.Unreachable(f"the connection to {address.url} failed: {error or type(error).__name__}") from error
