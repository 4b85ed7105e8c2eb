"""One real daemon for all tests of the server, with SmolLM2 created through blobs by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ollama
import pytest

from tests.server.daemon import Daemon, running


@pytest.fixture(scope="session")
def bare_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("server")
    with running(folder / "models", folder / "log") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def daemon(bare_daemon: Daemon, smollm2_path: Path) -> Daemon:
    """With the model `smollm2`."""
    with ollama.Client(bare_daemon.url) as client:
        digest = client.create_blob(smollm2_path)
        client.create("smollm2", files={"smollm2.gguf": digest})
    return bare_daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[ollama.Client]:
    with ollama.Client(daemon.url) as made:
        yield made
