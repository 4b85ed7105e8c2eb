"""Manifests: what a model consists of. Their JSON is Ollama's; fields that are not known here are kept.

A manifest is replaced as a whole by rename. Its temporary file lies at the top of `manifests/`, where neither program
looks for models (those are four levels deep).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ollamapy.errors import BadRequest, NotFound, StoreError
from ollamapy.names import ModelName
from ollamapy.store.digest import Digest
from ollamapy.store.files import older
from ollamapy.store.fsops import FileOps, explained, make_dirs, write_all

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_IMAGE = "application/vnd.ollama.image."
MODEL = _IMAGE + "model"
ADAPTER = _IMAGE + "adapter"
PROJECTOR = _IMAGE + "projector"
DRAFT = _IMAGE + "draft"
TEMPLATE = _IMAGE + "template"
PROMPT = _IMAGE + "prompt"  # a template, in old stores
SYSTEM = _IMAGE + "system"
PARAMS = _IMAGE + "params"
MESSAGES = _IMAGE + "messages"
LICENSE = _IMAGE + "license"
TENSOR = _IMAGE + "tensor"
JSON = _IMAGE + "json"
EMBED = _IMAGE + "embed"  # deprecated, without effect

MAX_MANIFEST_BYTES = 16 << 20
_TEMPORARY = ".new-"


class Layer(msgspec.Struct):
    """A blob in its role. `source` is `from` in the JSON: the parent model; `name` is that of a tensor or config file."""

    media_type: str = msgspec.field(name="mediaType")
    digest: str
    size: int
    source: str = msgspec.field(name="from", default="")
    name: str = ""
    extra: dict[str, Any] = {}

    @property
    def blob(self) -> Digest:
        """Raises BadRequest for a digest that is none."""
        return Digest.parse(self.digest)


class Manifest(msgspec.Struct):
    config: Layer
    layers: list[Layer]
    schema_version: int = msgspec.field(name="schemaVersion", default=2)
    media_type: str = msgspec.field(name="mediaType", default=MANIFEST_TYPE)
    extra: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Bytes of all blobs together."""
        return self.config.size + sum(layer.size for layer in self.layers)

    def blobs(self) -> set[Digest]:
        return {layer.blob for layer in [self.config, *self.layers]}

    def of_type(self, *media_types: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.media_type in media_types]

    def encode(self) -> bytes:
        known = {"schemaVersion": self.schema_version, "mediaType": self.media_type, "config": _fields(self.config)}
        return msgspec.json.encode({**known, "layers": [_fields(layer) for layer in self.layers], **self.extra})

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises msgspec.MsgspecError or BadRequest for what is no manifest."""
        document = msgspec.json.decode(data, type=dict[str, Any])
        document["config"] = _known(document.get("config"), Layer)
        document["layers"] = [_known(layer, Layer) for layer in document.get("layers") or []]
        manifest = _known(document, cls)
        manifest.blobs()  # checks every digest
        return manifest


class ConfigBlob(msgspec.Struct):
    """The config blob: what `list` and `show` say of a model without opening its weights."""

    model_format: str = ""
    model_family: str = ""
    model_families: list[str] | None = None
    model_type: str = ""  # parameter count as text, "3.2B"
    file_type: str = ""  # quantization as text, "Q4_K_M"
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    remote_model: str = ""
    capabilities: list[str] = []
    context_length: int = 0
    embedding_length: int = 0
    base_name: str = ""
    draft: dict[str, Any] = {}
    architecture: str = "amd64"
    os: str = "linux"
    rootfs: dict[str, Any] = {}
    extra: dict[str, Any] = {}

    def encode(self) -> bytes:
        return msgspec.json.encode(_fields(self, always=_CONFIG_ALWAYS))

    @classmethod
    def decode(cls, data: bytes) -> ConfigBlob:
        return _known(msgspec.json.decode(data, type=dict[str, Any]), cls)


_CONFIG_ALWAYS = frozenset(["model_format", "model_family", "model_families", "model_type", "file_type", "architecture", "os"])
_LAYER_ALWAYS = frozenset(("mediaType", "digest", "size"))
_T = TypeVar("_T", Layer, Manifest, ConfigBlob)


def _known(document: Any, type: type[_T]) -> _T:
    """A struct of the fields that it has, with the others in `extra`. Raises msgspec.ValidationError."""
    if not isinstance(document, dict):
        raise msgspec.ValidationError(f"Expected `object` for {type.__name__.lower()}")
    names = {field.encode_name for field in msgspec.structs.fields(type)} - {"extra"}
    known = {key: value for key, value in document.items() if key in names and value is not None}
    extra = {key: value for key, value in document.items() if key not in names}
    return msgspec.convert({**known, "extra": extra}, type)


def _fields(struct: Layer | ConfigBlob, always: frozenset[str] = _LAYER_ALWAYS) -> dict[str, Any]:
    """Wire names and values; empty ones only where Ollama always writes them."""
    document = msgspec.to_builtins(struct)
    extra = document.pop("extra")
    return {**{key: value for key, value in document.items() if value or key in always}, **extra}


class StoredManifest(msgspec.Struct, frozen=True):
    """A manifest file as found. `digest` is the hex SHA-256 of its bytes: the model's id."""

    name: ModelName
    data: bytes
    digest: str
    manifest: Manifest
    modified_at: datetime  # UTC


class ManifestStore:
    """The folder `manifests/` of a model store."""

    def __init__(self, root: Path, fs: FileOps | None = None) -> None:
        self.root, self.folder = root, root / "manifests"
        self.fs = fs or FileOps()

    def path(self, name: ModelName) -> Path:
        """Where the manifest is or would be: the one place where a manifest's path is made."""
        return self.folder.joinpath(*name.parts)

    def find(self, name: ModelName) -> ModelName | None:
        """The name as stored, which may differ in case; the exact case is preferred."""
        if self.path(name).is_file():
            return name
        return next((stored for stored in sorted(self.names(), key=str) if stored == name), None)

    def names(self) -> Iterator[ModelName]:
        """Of all manifest files, readable or not."""
        for host, namespace, model, tag in self._walk(self.folder, 4):
            with suppress(BadRequest):
                name = ModelName(model, tag=tag, namespace=namespace, host=host)
                if self.path(name).is_file():
                    yield name

    def read(self, name: ModelName) -> StoredManifest:
        """`name` as stored. NotFound; StoreError for an unreadable or broken manifest."""
        path = self.path(name)
        try:
            with explained(f"read the manifest of {name.short()}"):
                modified = os.stat(path).st_mtime
                data = self.fs.read(path, MAX_MANIFEST_BYTES + 1)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise NotFound(f"model '{name.given}' not found") from None
            raise
        if len(data) > MAX_MANIFEST_BYTES:
            raise StoreError(f"the manifest of {name.short()} is larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            manifest = Manifest.decode(data)
        except (msgspec.MsgspecError, BadRequest, UnicodeDecodeError) as error:
            raise StoreError(f"the manifest of {name.short()} is damaged: {error}") from error
        modified_at = datetime.fromtimestamp(modified, UTC)
        return StoredManifest(name, data, Digest.of(data).hex, manifest, modified_at)

    def mentions(self, name: ModelName) -> set[Digest]:
        """Every digest that stands in the file, even if it is damaged. StoreError when it cannot be read at all."""
        with explained(f"read the manifest of {name.short()}"):
            return Digest.mentioned(self.fs.read(self.path(name), MAX_MANIFEST_BYTES))

    def write(self, name: ModelName, data: bytes) -> None:
        """Puts a manifest in its place, atomically and durably. Its blobs must be in place."""
        fs = self.fs
        with explained(f"write the manifest of {name.short()}"):
            folder = make_dirs(fs, self.root, ("manifests", *name.parts[:3]))
            temporary = self.folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
            fd = fs.create(temporary)
            try:
                try:
                    write_all(fs, fd, data)
                    fs.fsync(fd)
                    fs.chmod(fd, 0o644)
                finally:
                    fs.close(fd)
                fs.rename(temporary, self.path(name))
            except BaseException:
                with suppress(OSError):  # the error that led here is the one to report
                    fs.unlink(temporary)
                raise
            fs.fsync_dir(folder)

    def remove(self, name: ModelName) -> None:
        with explained(f"remove the manifest of {name.short()}"):
            self.fs.unlink(self.path(name))
            self.fs.fsync_dir(self.path(name).parent)
        for folder in list(self.path(name).parents)[:3]:
            try:
                self.fs.rmdir(folder)
            except OSError:
                return  # not empty

    def remove_empty(self, age: float) -> None:
        """Removes folders without files, and temporary files older than `age` seconds that a killed writer left."""
        if not self.folder.is_dir():
            return
        with os.scandir(self.folder) as entries:
            stale = [Path(e.path) for e in entries if e.name.startswith(_TEMPORARY) and e.is_file() and older(e.stat(), age)]
        for path in stale:
            with suppress(OSError):
                self.fs.unlink(path)
        for folder, _, _ in os.walk(self.folder, topdown=False):
            if Path(folder) != self.folder:
                with suppress(OSError):  # not empty
                    self.fs.rmdir(Path(folder))

    def _walk(self, folder: Path, depth: int) -> Iterator[tuple[str, ...]]:
        """Parts of all paths of this depth, hidden ones left out. StoreError for a folder that cannot be read."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"cannot list the models: {error.strerror}") from error
        for name in names:
            if depth == 1:
                yield (name,)
            else:
                yield from ((name, *rest) for rest in self._walk(folder / name, depth - 1))
