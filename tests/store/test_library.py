"""The library: layout, interoperation with stores that Ollama wrote, damage, collection, several users at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ollamapy.errors import NotFound, StoreError
from ollamapy.names import ModelName
from ollamapy.store.digest import Digest
from ollamapy.store.library import Library
from ollamapy.store.manifests import MODEL, ConfigBlob, Layer, Manifest
from tests.store.stores import age, leftovers, make, name, state, violations

ROOT = Path(__file__).parents[2]


def test_layout(library: Library) -> None:
    manifest = make(library, "hf.co/Me/Mine:Q4", system="hi")
    path = library.root / "manifests" / "hf.co" / "Me" / "Mine" / "Q4"
    document = json.loads(path.read_bytes())
    assert document == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": manifest.config.digest,
            "size": manifest.config.size,
        },
        "layers": [
            {"mediaType": MODEL, "digest": Digest.of(b"weights").text, "size": 7},
            {"mediaType": "application/vnd.ollama.image.system", "digest": Digest.of(b"hi").text, "size": 2},
        ],
    }
    config = json.loads((library.root / "blobs" / manifest.config.digest.replace(":", "-")).read_bytes())
    assert config == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": None,
        "model_type": "1B",
        "file_type": "Q8_0",
        "architecture": "amd64",
        "os": "linux",
    }
    model = library.open(name("HF.co/me/mine:q4"))
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.size == sum(file.stat().st_size for file in (library.root / "blobs").iterdir())
    assert model.name.short() == "hf.co/Me/Mine:Q4" and model.name.given == "HF.co/me/mine:q4"


def test_list_is_newest_first(library: Library) -> None:
    for index, text in enumerate(("a", "b", "c")):
        make(library, text)
        os.utime(library.manifests.path(name(text)), (1000 + index % 2, 1000 + index % 2))
    assert library.list()[0].name.short() == "b:latest"
    assert library.list()[0].modified_at.timestamp() == 1001 and library.list()[0].modified_at.tzinfo is not None
    assert Library(library.root / "none").list() == []


OLLAMA_CONFIG = {
    "model_format": "gguf",
    "model_family": "llama",
    "model_families": ["llama"],
    "model_type": "1.2B",
    "file_type": "Q8_0",
    "architecture": "amd64",
    "os": "linux",
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]},
    "a_later_field": {"x": [1]},
}


def write_as_ollama(root: Path, text: str, blobs: dict[str, bytes], **extra: Any) -> bytes:
    """A store as Ollama writes it: indented manifest, unknown fields, 0644 files."""
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    layers = []
    for kind, data in {"config": json.dumps(OLLAMA_CONFIG).encode(), **blobs}.items():
        digest = Digest.of(data)
        (root / "blobs" / digest.file_name).write_bytes(data)
        media = "application/vnd.docker.container.image.v1+json" if kind == "config" else f"application/vnd.ollama.image.{kind}"
        layers.append({"mediaType": media, "digest": digest.text, "size": len(data), "annotation": {"later": True}})
    document = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
    data = json.dumps({**document, "config": layers[0], "layers": layers[1:], **extra}, indent=3).encode()
    path = root.joinpath("manifests", *name(text).parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


OLLAMA_BLOBS = {
    "model": b"GGUF...",
    "template": "{{ .Prompt }} é".encode(),
    "system": b"sys",
    "params": b'{"stop":["<|a|>"],"temperature":0.6,"num_ctx":4096}',
    "messages": b'[{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]',
    "license": b"MIT",
    "projector": b"clip",
    "adapter": b"lora",
    "embed": b"old",
    "something.new": b"?",
}


def test_a_model_of_ollama(library: Library) -> None:
    data = write_as_ollama(library.root, "llama3.2:1b", OLLAMA_BLOBS, subject="later")
    model = library.open(name("llama3.2:1b"))
    assert (model.template, model.system, model.licenses) == ("{{ .Prompt }} é", "sys", ["MIT"])
    assert model.params == {"stop": ["<|a|>"], "temperature": 0.6, "num_ctx": 4096}
    assert [(message.role, message.content) for message in model.messages] == [("user", "hi"), ("assistant", "ho")]
    assert model.model_path is not None and model.model_path.read_bytes() == b"GGUF..."
    assert len(model.adapter_paths) == len(model.projector_paths) == 1 and model.draft_path is None
    assert model.config.model_type == "1.2B" and model.digest == hashlib.sha256(data).hexdigest()
    library.copy(name("llama3.2:1b"), name("mine"))
    assert library.manifests.path(name("mine")).read_bytes() == data  # byte for byte


def test_unknown_fields_are_kept(library: Library) -> None:
    write_as_ollama(library.root, "x", {"model": b"w"}, subject={"later": 1})
    model = library.open(name("x"))
    again = json.loads(Manifest.decode(model.manifest.encode()).encode())
    assert again["subject"] == {"later": 1} and again["layers"][0]["annotation"] == {"later": True}
    assert json.loads(ConfigBlob.decode(model.config.encode()).encode()) == OLLAMA_CONFIG


def test_old_prompt_layer_and_null_lists(library: Library) -> None:
    write_as_ollama(library.root, "x", {"model": b"w", "prompt": b"{{ .Old }}"})
    assert library.open(name("x")).template == "{{ .Old }}"
    write_as_ollama(library.root, "stub", {}, layers=None)
    assert library.open(name("stub")).model_path is None


def test_case_is_ignored_but_kept(library: Library) -> None:
    make(library, "Me/Foo:Bar")
    assert library.resolve(name("me/foo:bar")) == name("me/foo:bar")
    assert str(library.resolve(name("ME/FOO:BAR"))) == "registry.ollama.ai/Me/Foo:Bar"
    make(library, "me/FOO:bar", weights=b"other")
    assert [model.name.short() for model in library.list()] == ["Me/Foo:Bar"]
    library.copy(name("me/foo:bar"), name("me/foo:BAR"))
    assert len(library.list()) == 1
    library.delete(name("mE/fOO:bAR"))
    assert library.list() == [] and library.resolve(name("me/foo:bar")) is None


def test_not_found(library: Library) -> None:
    for action in (
        lambda: library.open(name("Nope")),
        lambda: library.delete(name("Nope")),
        lambda: library.copy(name("Nope"), name("x")),
    ):
        with pytest.raises(NotFound, match=r"^model 'Nope' not found$"):
            action()


def test_copy_and_delete_share_blobs(library: Library) -> None:
    make(library, "a", system="only a")
    make(library, "b", weights=b"weights", system="only b")
    library.copy(name("a"), name("c"))
    library.delete(name("a"))
    assert library.blobs.has(Digest.of(b"only a"))
    library.copy(name("b"), name("c"))  # replaces
    assert not library.blobs.has(Digest.of(b"only a")) and library.blobs.has(Digest.of(b"weights"))
    library.delete(name("b"))
    library.delete(name("c"))
    assert [path for path in library.root.rglob("*") if path.is_file()] == [library.root / ".lock"]
    assert [path.name for path in (library.root / "manifests").iterdir()] == []


def test_write_refuses_missing_blobs(library: Library) -> None:
    manifest = make(library, "a")
    for size, digest in ((8, Digest.of(b"weights")), (7, Digest.of(b"nothing"))):
        with pytest.raises(StoreError, match="missing or does not have"):
            library.write(name("b"), Manifest(manifest.config, [Layer(MODEL, digest.text, size)]))
    assert library.resolve(name("b")) is None


TORN = [b"", b"{", b"null", b"[]", b"{}", b'{"config":{}}', b"\x00" * 500, b"\xff\xfe", b'{"layers":[{"digest":"../../x"}]}']


@pytest.mark.parametrize("torn", range(len(TORN) + 4))
def test_a_damaged_manifest_hides_only_itself(library: Library, caplog: pytest.LogCaptureFixture, torn: int) -> None:
    make(library, "good", system="shared")
    make(library, "bad", weights=b"of bad", system="shared")
    make(library, "other", system="other")
    path = library.manifests.path(name("bad"))
    data = path.read_bytes()
    cut = [data[:1], data[: len(data) // 2], data[:-1], data[: data.rindex(b'"')]]
    path.write_bytes((TORN + cut)[torn])
    with caplog.at_level(logging.WARNING):
        assert {model.name.model for model in library.list()} == {"good", "other"}
    assert "bad" in caplog.text
    with pytest.raises(StoreError, match="manifest of bad:latest is damaged"):
        library.open(name("bad"))
    library.delete(name("other"))
    assert not library.blobs.has(Digest.of(b"other"))
    age(library)
    library.prune()  # must not collect what the damaged manifest may have meant
    assert library.blobs.has(Digest.of(b"of bad")) and violations(library.root) != []
    library.delete(name("bad"))
    assert library.open(name("good")).system == "shared" and violations(library.root) == []


def test_digests_in_a_torn_manifest_are_not_collected(library: Library) -> None:
    make(library, "a", weights=b"big")
    make(library, "b", weights=b"big")
    path = library.manifests.path(name("a"))
    path.write_bytes(path.read_bytes()[:-1])
    library.delete(name("b"))
    assert library.blobs.has(Digest.of(b"big"))


def test_damaged_texts(library: Library) -> None:
    write_as_ollama(library.root, "x", {"model": b"w", "params": b"[1]"})
    with pytest.raises(StoreError, match="layer of the model is damaged"):
        library.open(name("x"))
    write_as_ollama(library.root, "y", {"model": b"weights of y", "system": b"text"})
    (library.root / "blobs" / Digest.of(b"text").file_name).write_bytes(b"tex!")
    with pytest.raises(StoreError, match="does not have this hash"):
        library.open(name("y"))
    (library.root / "blobs" / Digest.of(b"text").file_name).write_bytes(b"text")
    (library.root / "blobs" / Digest.of(b"weights of y").file_name).write_bytes(b"weights")
    with pytest.raises(StoreError, match="is damaged: 7 bytes instead of 12"):
        library.open(name("y"))
    assert any("missing or does not have 12 bytes" in line for line in library.check())
    assert any("content its name says" in line for line in library.check(deep=True))
    (library.root / "blobs" / Digest.of(b"weights of y").file_name).unlink()
    assert library.open(name("y")).model_path is not None  # `show` works without weights


def test_missing_config_hides_only_that_model(library: Library) -> None:
    make(library, "a")
    write_as_ollama(library.root, "b", {"model": b"w"})
    library.blobs.delete(library.open(name("b")).manifest.config.blob)
    assert [model.name.model for model in library.list()] == ["a"]


def test_odd_files_among_the_manifests(library: Library) -> None:
    make(library, "a")
    folder = library.manifests.path(name("a")).parent
    (folder / ".DS_Store").write_text("x")
    (folder / "no tag").write_text("x")
    (folder / "folder").mkdir()
    (library.root / "manifests" / "README").write_text("x")
    (library.root / "manifests" / "registry.ollama.ai" / "file").write_text("x")
    assert [model.name.short() for model in library.list()] == ["a:latest"]


class StoreMachine(RuleBasedStateMachine):
    """Random operations against a dictionary; the store must agree after every one."""

    names = st.sampled_from(("a", "A:latest", "b:1", "me/c", "ME/C"))
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        root = self.folder / hashlib.sha256(os.urandom(8)).hexdigest()[:16]
        self.library = Library(root)
        self.models: dict[ModelName, str] = {}

    @rule(text=names, weights=st.sampled_from((b"x", b"y")), system=st.sampled_from(("", "p", "q")))
    def create(self, text: str, weights: bytes, system: str) -> None:
        make(self.library, text, weights=weights, system=system)
        self.models[name(text)] = system

    @rule(source=names, destination=names)
    def copy(self, source: str, destination: str) -> None:
        if name(source) in self.models:
            self.library.copy(name(source), name(destination))
            self.models[name(destination)] = self.models[name(source)]
        else:
            with pytest.raises(NotFound):
                self.library.copy(name(source), name(destination))

    @rule(text=names)
    def delete(self, text: str) -> None:
        if name(text) in self.models:
            self.library.delete(name(text))
            del self.models[name(text)]
        else:
            with pytest.raises(NotFound):
                self.library.delete(name(text))

    @rule()
    def restart(self) -> None:
        self.library = Library(self.library.root)
        age(self.library)
        self.library.prune()

    @invariant()
    def agrees(self) -> None:
        assert {model.name: self.library.open(model.name).system for model in self.library.list()} == self.models
        assert violations(self.library.root) == [] and leftovers(self.library.root) == []
        used = set[Digest]().union(*(self.library.open(known).manifest.blobs() for known in self.models))
        assert set(self.library.blobs.digests()) == used


def test_against_a_model(memory: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    StoreMachine.folder = memory
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=40, stateful_step_count=15, deadline=None))


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    library = Library(tmp_path / "models")
    with pytest.raises(StoreError):
        make(library, "a")
    assert library.list() == []


def test_import_is_fast_and_light() -> None:
    code = (
        "import sys, ollamapy.store.library; print(sorted({'torch', 'numpy', 'asyncio', 'ssl', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_state_of_the_helpers(library: Library) -> None:
    """The checks used by the crash tests must be able to fail."""
    make(library, "a", system="x")
    assert violations(library.root) == [] and list(state(library.root)) == ["library/a:latest"]
    path = library.blobs.path(Digest.of(b"weights"))
    os.chmod(path, 0o644)
    path.write_bytes(b"weightz")
    assert len(violations(library.root)) == 1
    path.unlink()
    assert len(violations(library.root)) == 1 and violations(library.root, partial_models=True) == []
    library.manifests.path(name("a")).write_bytes(b"{")
    assert len(violations(library.root)) == 1
