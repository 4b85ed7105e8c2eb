"""OLLAMA_HOST: where the server listens and where the client calls.

    [scheme://]host[:port][/path]

Without a port: 80 for http://, 443 for https://, 11434 with no scheme. Bare `ollama.com` is https.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 11434
_SCHEME_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """`host` has no brackets; "" means all interfaces to a server and this machine to a client."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Never fails: a bad port is reported and the default taken."""
        text = text.strip().strip("\"'")
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
        default_port = _SCHEME_PORTS.get(scheme, DEFAULT_PORT) if separator else DEFAULT_PORT
        hostport, _, path = rest.partition("/")
        host, port = _split(hostport)
        number = default_port
        if port is not None:
            if port.isascii() and port.isdigit() and int(port) <= 65535:
                number = int(port)
            else:
                log.warning("invalid port %r in OLLAMA_HOST, using %d", port, default_port)
        return cls(scheme, host, number, path.strip("/"))

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Base URL for a client; an unspecified address is reached through loopback."""
        host = {"": DEFAULT_HOST, "0.0.0.0": DEFAULT_HOST, "::": "::1"}.get(self.host, self.host)
        base = f"{self.scheme}://{Address(self.scheme, host, self.port).netloc}"
        return f"{base}/{self.path}" if self.path else base

    @property
    def is_loopback(self) -> bool:
        """Whether a server bound here can be reached from this machine only."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _split(hostport: str) -> tuple[str, str | None]:
    """Host without brackets and the port's text, None where there is none. No host and no port: the default host."""
    if hostport.startswith("["):
        host, _, rest = hostport[1:].partition("]")
        return host, rest[1:] if rest.startswith(":") else None
    if hostport.count(":") == 1:
        host, _, port = hostport.partition(":")
        return host, port
    return hostport or DEFAULT_HOST, None
