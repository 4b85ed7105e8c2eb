"""A daemon whose engine only counts, with its model `count`: the whole server without the cost of a model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench import fake_engine
from tests.server import daemon
from tests.server.daemon import Daemon

SERVE = (sys.executable, str(Path(fake_engine.__file__)), "serve")
MODEL = "count"


@contextmanager
def counting(folder: Path, key: str = "", **variables: str) -> Iterator[Daemon]:
    """`key`: one that it asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemon, "SERVE", SERVE)
        with daemon.running(folder / "models", folder / "log", **variables) as made:
            fake_engine.write_model(folder / "count.gguf")
            content = (folder / "count.gguf").read_bytes()
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            headers = {"x-api-key": key} if key else {}
            httpx.post(f"{made.url}/api/blobs/{digest}", content=content, headers=headers, trust_env=False).raise_for_status()
            asked = {"model": MODEL, "files": {"count.gguf": digest}, "stream": False}
            made.post("/api/create", asked, headers=headers).raise_for_status()
            yield made
