"""What every request passes before any handler: Host, Origin, content type, header sizes, CORS; and its client's leaving.

A web page must not be able to drive the daemon: neither by a name that resolves to loopback (Host check) nor by requests
that browsers send without asking first (Origin check before routing, not just missing CORS headers).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollamapy.api.address import Address
from ollamapy.errors import OllamapyError
from ollamapy.server.caller import TIER_HEADER, caller_of
from ollamapy.server.record import Record, Totals, current, enter
from ollamapy.server.stream import WARNING_HEADER, error_response
from ollamapy.server.tracing import Tracing

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
QUEUE_POSITION_HEADER, QUEUE_TIME_HEADER = "X-Queue-Position", "X-Queue-Time-Ms"
_EXPOSED = ", ".join((WARNING_HEADER, REQUEST_ID_HEADER, QUEUE_POSITION_HEADER, QUEUE_TIME_HEADER, "Retry-After"))
MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 100
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "0.0.0.0")
# file:// and "null" are not among them: any page opened from a disk, or in a sandboxed frame, has those.
_APP_ORIGINS = ("app://*", "tauri://*", "vscode-webview://*", "vscode-file://*")
_STAINLESS = "arch async custom-poll-interval helper-method lang os package-version poll-helper retry-count runtime "
_STAINLESS += "runtime-version timeout"
_ALLOWED_HEADERS = ["Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta", TIER_HEADER]
_ALLOWED_HEADERS += [f"x-stainless-{name}" for name in _STAINLESS.split()]
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
    "Access-Control-Allow-Headers": ",".join(_ALLOWED_HEADERS),
    "Access-Control-Max-Age": "43200",
}


class _Unsupported(OllamapyError):
    status = 415


class _HeadersTooLarge(OllamapyError):
    status = 431


class HostPolicy:
    """Which Host headers are answered.

    An IP address is no name that somebody could point at us: on a loopback address those of this machine and of private
    networks are answered, elsewhere all. Names: localhost, this machine's, the one in OLLAMA_HOST, those under .localhost,
    .local and .internal; and not on loopback those without a dot, as containers have, which no public DNS serves.
    """

    def __init__(self, address: Address) -> None:
        self._loopback = address.is_loopback
        self._names = {"localhost", socket.gethostname().lower(), address.host.lower()} - {""}

    def allows(self, header: str) -> bool:
        name = _host_of(header)
        if not name:
            return False
        try:
            ip = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return self._allows_name(name.removesuffix("."))
        return not self._loopback or ip.is_loopback or ip.is_private or ip.is_unspecified

    def _allows_name(self, name: str) -> bool:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", name):
            return False
        if name in self._names or name.endswith((".localhost", ".local", ".internal")):
            return True
        return not self._loopback and "." not in name and not name.isdigit()


class OriginPolicy:
    """Which pages may call us: those on this machine, apps, and those of OLLAMA_ORIGINS, where `*` stands for any text."""

    def __init__(self, configured: Iterable[str]) -> None:
        local = [f"{scheme}://{host}{port}" for scheme in ("http", "https") for host in _LOCAL_HOSTS for port in ("", ":*")]
        patterns = [*local, *_APP_ORIGINS, *configured]
        self.any = "*" in patterns
        self._patterns = [_pattern(pattern) for pattern in patterns]

    def allows(self, origin: str, host: str) -> bool:
        """`host` is the request's Host, which has been checked: a page of our own may call us."""
        if self.any or any(pattern.fullmatch(origin) for pattern in self._patterns):
            return True
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _pattern(text: str) -> re.Pattern[str]:
    """`*` stands for any text, but as a port only for a number: `http://localhost:*` is not `http://localhost:1.evil.com`."""
    escaped = re.escape(text)
    if escaped.endswith(r":\*") and not text.endswith("//*"):
        return re.compile(escaped[: -len(r"\*")].replace(r"\*", ".*") + "[0-9]{1,5}", re.IGNORECASE)
    return re.compile(escaped.replace(r"\*", ".*"), re.IGNORECASE)


def _host_of(header: str) -> str:
    """The name or address in a Host header, without its port, in lower case; "" where it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@/\\\s]+))(?::[0-9]{1,5})?", header)
    return (match[1] or match[2]).lower() if match else ""


class Recorded:
    """Gives every request an id of ours, which its answer carries, and keeps its record. The outermost of all."""

    def __init__(self, app: ASGIApp, totals: Totals, tracing: Tracing | None = None) -> None:
        self.app, self._totals, self._tracing = app, totals, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        record = Record(self._totals, scope["method"], scope["path"], f"{client[0]}:{client[1]}" if client else "")
        record.caller = caller_of(Headers(scope=scope), client[0] if client else "")
        enter(record)

        def sending(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = record.id
                if record.queue_position >= 0:
                    headers[QUEUE_POSITION_HEADER] = str(record.queue_position)
                if record.queue_ns:  # or it still waits
                    headers[QUEUE_TIME_HEADER] = f"{record.queue_ns / 1e6:.1f}"
            return send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            record.status = record.status or 500  # answered by what is around us
            raise
        finally:
            record.close()
            if self._tracing is not None:
                self._tracing.finished(record, Headers(scope=scope).get("traceparent", ""))


class Guard:
    """Refuses requests before routing. 403 for Host has no body, as Ollama's."""

    def __init__(self, app: ASGIApp, address: Address, origins: Iterable[str]) -> None:
        self.app = app
        self._hosts, self._origins = HostPolicy(address), OriginPolicy(origins)
        for origin in origins:
            if "://" not in origin and origin != "*":
                log.warning("OLLAMA_ORIGINS: %r has no scheme and matches nothing", origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused(scope, receive, send)
            return
        origin = headers.get("origin")
        cors = _cors(origin, self._origins.any) if origin else {}
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_preflight(headers, cors))(scope, receive, send)
            return
        await self.app(scope, receive, _adding(cors, send) if cors else send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            return error_response(scope["path"], _HeadersTooLarge("the request's headers are too large"))
        host, origin = headers.getlist("host"), headers.getlist("origin")
        if len(host) != 1 or not self._hosts.allows(host[0]):
            return Response(status_code=403)
        if not origin:
            return Response(status_code=403) if headers.get("sec-fetch-site") == "cross-site" else None
        if len(origin) != 1 or not self._origins.allows(origin[0], host[0]):
            return Response(status_code=403)
        blob = scope["path"].startswith("/api/blobs/")
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") and not blob and not _is_json(headers.get("content-type", "")):
            return error_response(scope["path"], _Unsupported("requests of web pages must have Content-Type: application/json"))
        return None


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _cors(origin: str, any: bool) -> dict[str, str]:
    allowed = {"Access-Control-Allow-Origin": "*"} if any else {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    return {**allowed, "Access-Control-Expose-Headers": _EXPOSED}


def _preflight(headers: Headers, cors: dict[str, str]) -> dict[str, str]:
    if not cors:
        return {}
    private = headers.get("access-control-request-private-network") == "true"
    return {**cors, **_PREFLIGHT, **({"Access-Control-Allow-Private-Network": "true"} if private else {})}


def _adding(extra: dict[str, str], send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(extra)
        await send(message)

    return adding


class Disconnects:
    """Cancels a request's handler as soon as its client has left: while queued, loading, encoding or generating alike.

    The handlers' own `finally`s free what they hold. Nothing else in the server looks for disconnects.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        handler = asyncio.current_task()
        assert handler is not None
        messages: asyncio.Queue[Message] = asyncio.Queue(1)  # one: the transport's flow control holds for uploads
        answered = gone = False

        async def watch() -> None:
            nonlocal gone
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            if not answered:
                gone = True
                handler.cancel()

        def sending(message: Message) -> Awaitable[None]:  # no coroutine of its own: every token passes here
            nonlocal answered
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered = True
            return send(message)

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, messages.get, sending)
        except asyncio.CancelledError:
            if not gone:
                raise
            handler.uncancel()
            current().client_left()
            log.debug("%s %s: the client left", scope["method"], scope["path"])
        finally:
            watcher.cancel()
