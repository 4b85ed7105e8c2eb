"""A daemon whose engine only counts, with its model `count`: the whole server without the cost of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import fake_engine
from bench.server import create
from tests.server.daemon import Daemon, running

SERVE = (sys.executable, str(Path(fake_engine.__file__)), "serve")


@contextmanager
def counting(folder: Path, key: str = "", **variables: str) -> Iterator[Daemon]:
    """`key`: one that it asks for."""
    with running(folder / "models", folder / "log", command=SERVE, **variables) as made:
        create(made.url, folder, {"x-api-key": key} if key else {})
        yield made
