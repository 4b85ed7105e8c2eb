"""Our own client against a real daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollamapy.api.address import Address
from ollamapy.api.client import Client
from ollamapy.api.messages import Message
from ollamapy.api.types import ChatRequest, CreateRequest, EmbedRequest, GenerateRequest, ModelRequest
from ollamapy.errors import BadRequest, NotFound, NotSupported, Unreachable
from tests.daemon import free_port
from tests.server.daemon import Daemon

MODEL = "smollm2"
SHORT = {"num_predict": 3, "temperature": 0}


@pytest.fixture
def api(daemon: Daemon) -> Iterator[Client]:
    with Client(Address.parse(f"127.0.0.1:{daemon.port}")) as made:
        yield made


def test_models(api: Client) -> None:
    assert api.version()
    api.copy(MODEL, "other")
    assert {"smollm2:latest", "other:latest"} <= {model.name for model in api.tags().models}
    api.delete("other")
    assert "other:latest" not in {model.name for model in api.tags().models}
    shown = api.show(ModelRequest(model=MODEL))
    assert shown.details.family == "llama" and shown.model_info["llama.block_count"] == 30
    with pytest.raises(NotFound, match="model 'missing' not found"):
        api.show(ModelRequest(model="missing"))
    with pytest.raises(NotSupported):
        list(api.generate(GenerateRequest(model=MODEL, prompt="x", images=["AAAA"])))


def test_answers(api: Client) -> None:
    api.load(MODEL, "5m")
    lines = list(api.generate(GenerateRequest(model=MODEL, prompt="Hi", options=SHORT)))
    assert 2 <= len(lines) <= 4 and lines[-1].eval_count == 3
    (whole,) = api.generate(GenerateRequest(model=MODEL, prompt="Hi", options=SHORT, stream=False))
    assert whole.response == "".join(line.response for line in lines)
    chat = list(api.chat(ChatRequest(model=MODEL, messages=[Message(role="user", content="Hi")], options=SHORT)))
    assert "".join(line.message.content for line in chat) == whole.response
    assert len(api.embed(EmbedRequest(model=MODEL, input=["a", "b"])).embeddings) == 2
    (loaded,) = api.ps(verbose=True).models
    assert loaded.name == "smollm2:latest" and loaded.engine["pid"] > 0 and loaded.engine["stats"]["integrity"] == "ok"


def test_leaving_an_answer_ends_it(api: Client, daemon: Daemon) -> None:
    lines = api.generate(GenerateRequest(model=MODEL, prompt="A long story:", options={"num_predict": 2000}))
    assert next(lines).response
    lines.close()
    daemon.seconds_until_idle()


def test_upload_and_create(api: Client, tmp_path: Path, smollm2_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes(b"some text" * 300_000)
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    steps: list[tuple[int, int]] = []
    assert not api.has_blob(digest)
    api.upload_blob(digest, path, lambda done, total: steps.append((done, total)))
    assert api.has_blob(digest) and steps[-1] == (2_700_000, 2_700_000) and len(steps) > 1
    with pytest.raises(BadRequest, match="digest mismatch"):
        api.upload_blob("sha256:" + "0" * 64, path, lambda done, total: None)
    made = [line.status for line in api.create(CreateRequest(model="made", base=MODEL, system="Be brief."))]
    assert made[-1] == "success"
    assert api.show(ModelRequest(model="made")).system == "Be brief."
    api.delete("made")


def test_no_server() -> None:
    with Client(Address.parse(f"127.0.0.1:{free_port()}")) as nobody, pytest.raises(Unreachable):
        nobody.version()
