"""The server's process once it is started: listens, logs the settings, runs the application until it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from ollamapy import __version__
from ollamapy.api.address import Address
from ollamapy.env import Settings
from ollamapy.errors import OllamapyError
from ollamapy.lifecycle.residents import Residents
from ollamapy.server.app import create_app
from ollamapy.server.connection import Connection
from ollamapy.server.keys import KeysError, read_keys

log = logging.getLogger(__name__)

BACKLOG = 2048
DRAIN_SECONDS = 10  # that requests in flight get at the first signal
IDLE_SECONDS = 75  # that a connection may stay open without a request


class ListenError(OllamapyError):
    """The address cannot be listened on."""


class _Server(uvicorn.Server):
    """Ends with exit status 0 on SIGINT and SIGTERM; at once on the second."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def run(settings: Settings, residents: Residents) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit status: 0, or 1 when the address cannot be
    listened on or the keys cannot be read. Logging is set up."""
    address = Address.parse(settings.host)
    try:
        keys = read_keys(settings.api_keys)
        sockets = listen(address)
        metrics_sockets = listen(Address.parse(settings.metrics)) if settings.metrics else []
    except (KeysError, ListenError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    log.info("server config %s", settings.describe())
    if not address.is_loopback and not keys:
        log.warning(
            "listening on %s without authentication: everyone who reaches this port can use it and delete models; "
            "set OLLAMAPY_API_KEYS",
            address.netloc,
        )
    config = uvicorn.Config(
        create_app(settings, residents, metrics_sockets),
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config)
    log.info("listening on %s (version %s)", ", ".join(_shown(s) for s in sockets), __version__)
    if metrics_sockets:
        log.info("metrics on %s", ", ".join(_shown(s) for s in metrics_sockets))
    server.run(sockets)
    return 0


def listen(address: Address) -> list[socket.socket]:
    """Listening sockets on every address that the host has. Raises ListenError."""
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise ListenError(f"listen tcp {address.netloc}: {error.strerror}") from error
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, where in found:
        try:
            sockets.append(_bound(family, kind, protocol, where))
        except OSError as error:
            if sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # no IPv6 here
            for opened in sockets:
                opened.close()
            raise ListenError(f"listen tcp {address.netloc}: bind: {(error.strerror or str(error)).lower()}") from error
    return sockets


def _bound(family: int, kind: int, protocol: int, where: object) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(where)  # type: ignore[arg-type]
        made.listen(BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
