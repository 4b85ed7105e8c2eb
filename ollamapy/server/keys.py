"""API keys: which requests may pass, where keys are configured. The one place that compares them; keeps only their hashes.

OLLAMAPY_API_KEYS has them: a comma separated list, or the path of a file with one in each line. What cannot be read, or has no
key in it, keeps the server from starting: a typing error must not open it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ollamapy.errors import OllamapyError, Unauthorized
from ollamapy.server.caller import key_of, with_key
from ollamapy.server.record import current
from ollamapy.server.stream import error_response

OPEN = ("/", "/api/version")  # what health checks ask for; says nothing of models
MAX_FILE_BYTES = 1 << 20


class KeysError(OllamapyError):
    """OLLAMAPY_API_KEYS is not usable. Its text holds no key."""


def read_keys(text: str) -> tuple[str, ...]:
    """The keys of a list or of a file's lines (blank ones and those that begin with # do not count); none of "".

    Raises KeysError.
    """
    if not text:
        return ()
    if text.startswith(("/", "~/", "./", "../")):
        keys = [line.strip() for line in _content(Path(text).expanduser()).splitlines()]
        keys = [line for line in keys if line and not line.startswith("#")]
    else:
        keys = [part.strip() for part in text.split(",") if part.strip()]
    if not keys:
        raise KeysError("OLLAMAPY_API_KEYS is set and has no key in it")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise KeysError("OLLAMAPY_API_KEYS: a key has characters that no header carries (printable ASCII without blanks does)")
    return tuple(keys)


def _content(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"OLLAMAPY_API_KEYS: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeysError(f"OLLAMAPY_API_KEYS: {path} is larger than {MAX_FILE_BYTES} bytes")
    return content


class Keys:
    """Answers 401 to requests without one of `keys`, before routing. Without any configured everyone may pass."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._hashes = [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hashes and scope["path"] not in OPEN:
            key = key_of(Headers(scope=scope))
            if not self._holds(key):
                text = "invalid API key" if key else "this server needs an API key: send it as Authorization: Bearer KEY"
                await error_response(scope["path"], Unauthorized(text))(scope, receive, send)
                return
            record = current()
            record.caller = with_key(record.caller, key)
        await self.app(scope, receive, send)

    def _holds(self, key: str) -> bool:
        """Takes the same time whichever it is, and however much of it is right."""
        given = _hash(key)
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
