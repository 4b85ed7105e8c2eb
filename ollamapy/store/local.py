"""A model as it stands in the store, with its texts read. Knows nothing of requests, templates or weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from ollamapy.api.messages import Message
from ollamapy.errors import StoreError
from ollamapy.names import ModelName
from ollamapy.store import manifests
from ollamapy.store.blobs import BlobStore
from ollamapy.store.manifests import ConfigBlob, Manifest, StoredManifest

log = logging.getLogger(__name__)

MAX_TEXT_BYTES = 16 << 20  # of a template, system text, licence, parameters, messages, config


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What `list` shows. `digest` is hex, without a prefix; `size` is bytes of all blobs."""

    name: ModelName
    digest: str
    size: int
    modified_at: datetime
    config: ConfigBlob


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model with all its texts read. Paths are of blobs; whether the weights fit the engine is not looked at."""

    name: ModelName
    digest: str
    manifest: Manifest
    config: ConfigBlob
    size: int
    modified_at: datetime
    model_path: Path | None = None
    adapter_paths: list[Path] = field(default_factory=list)
    projector_paths: list[Path] = field(default_factory=list)
    draft_path: Path | None = None
    template: str | None = None
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)


def read_config(blobs: BlobStore, manifest: Manifest) -> ConfigBlob:
    """StoreError when it is missing or damaged."""
    try:
        return ConfigBlob.decode(blobs.read(manifest.config.blob, MAX_TEXT_BYTES))
    except msgspec.MsgspecError as error:
        raise StoreError(f"the config of the model is damaged: {error}") from error


def load(blobs: BlobStore, stored: StoredManifest) -> LocalModel:
    """StoreError when a text or the size of a blob is not what it should be."""
    manifest = stored.manifest
    texts = {kind: _texts(blobs, manifest, *kinds) for kind, kinds in _TEXT_LAYERS.items()}
    if manifest.of_type(manifests.EMBED):
        log.warning("%s: embeddings in a model are deprecated and have no effect", stored.name.short())
    drafts, models = _paths(blobs, manifest, manifests.DRAFT), _paths(blobs, manifest, manifests.MODEL)
    return LocalModel(
        name=stored.name,
        digest=stored.digest,
        manifest=manifest,
        config=read_config(blobs, manifest),
        size=manifest.size,
        modified_at=stored.modified_at,
        model_path=models[0] if models else None,
        adapter_paths=_paths(blobs, manifest, manifests.ADAPTER),
        projector_paths=_paths(blobs, manifest, manifests.PROJECTOR),
        draft_path=drafts[0] if drafts else None,
        template=texts["template"][-1] if texts["template"] else None,
        system=texts["system"][-1] if texts["system"] else "",
        params=_json(texts["params"], dict[str, Any]) or {},
        messages=_json(texts["messages"], list[Message]) or [],
        licenses=texts["license"],
    )


def _paths(blobs: BlobStore, manifest: Manifest, media_type: str) -> list[Path]:
    """Blob paths of the layers of a type. StoreError for one that is there with the wrong size.

    One that is missing is left for whoever opens it: `show` works without weights.
    """
    layers = manifest.of_type(media_type)
    for layer in layers:
        size = blobs.size(layer.blob)
        if size not in (None, layer.size):
            raise StoreError(f"blob {layer.digest[:19]} is damaged: {size} bytes instead of {layer.size}")
    return [blobs.path(layer.blob) for layer in layers]


def _texts(blobs: BlobStore, manifest: Manifest, *media_types: str) -> list[str]:
    found = (blobs.read(layer.blob, MAX_TEXT_BYTES) for layer in manifest.of_type(*media_types))
    return [data.decode(errors="replace") for data in found]


_TEXT_LAYERS = {
    "template": (manifests.TEMPLATE, manifests.PROMPT),
    "system": (manifests.SYSTEM,),
    "params": (manifests.PARAMS,),
    "messages": (manifests.MESSAGES,),
    "license": (manifests.LICENSE,),
}


def _json(texts: list[str], type: Any) -> Any:
    """The last of the texts decoded; None when there is none."""
    if not texts:
        return None
    try:
        return msgspec.json.decode(texts[-1], type=type)
    except msgspec.MsgspecError as error:
        raise StoreError(f"a layer of the model is damaged: {error}") from error
