"""What uploaded GGUF blobs are: weights, projectors or adapters; and the joining of split files into one blob.

Reads headers only. Knows nothing of the request they came with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ollamapy.errors import BadRequest, GGUFError
from ollamapy.gguf.reader import GGUFFile, is_gguf
from ollamapy.gguf.types import file_type_name, num_elements
from ollamapy.gguf.writer import write_gguf
from ollamapy.store import manifests
from ollamapy.store.blobs import BlobStore
from ollamapy.store.digest import Digest

BESIDE = (".json", ".jinja", ".md", ".txt")  # files of a model's folder that a GGUF does not need
_UNCONVERTED = {".safetensors": "safetensors", ".pth": "PyTorch checkpoints", ".pt": "PyTorch checkpoints"}


_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFLayer(NamedTuple):
    media_type: str
    digest: Digest
    size: int  # bytes
    architecture: str
    num_parameters: int
    file_type: str
    context_length: int
    embedding_length: int


def read_layers(
    blobs: BlobStore, files: dict[str, str], parsing: Callable[[], None], may_be_empty: bool = False
) -> list[GGUFLayer]:
    """Layers of the files of a request (relative name -> digest text), in the order of their names.

    `parsing` is called before each file is opened. The parts of a split file become one new blob. Raises BadRequest.
    """
    paths = _gguf_paths(blobs, files)
    if not paths and not may_be_empty:
        raise BadRequest("no files provided to convert")
    groups: dict[str, list[str]] = {}
    for name in sorted(paths):
        match = _SPLIT_NAME.fullmatch(name)
        groups.setdefault(f"{match[1]} of {match[3]}" if match else name, []).append(name)
    layers = []
    for names in groups.values():
        parsing()
        with _opened(names, paths) as file:
            if len(names) == 1:
                digest, size = Digest.parse(files[names[0]]), os.stat(file.path).st_size
            else:
                digest, size = _merge(blobs, file)
            layers.append(_layer(file, digest, size))
    return layers


def _gguf_paths(blobs: BlobStore, files: dict[str, str]) -> dict[str, Path]:
    """Name -> blob of the GGUF files; BadRequest where anything else is among them."""
    paths: dict[str, Path] = {}
    for name, text in files.items():
        digest, suffix = Digest.parse(text), Path(name).suffix
        if suffix in _UNCONVERTED:
            raise BadRequest(f"creating a model from {_UNCONVERTED[suffix]} is not supported yet: {name}")
        if not blobs.has(digest):
            raise BadRequest(f"blob not found for {name} (digest {digest})")
        if is_gguf(blobs.path(digest)):
            paths[name] = blobs.path(digest)
        elif suffix == ".gguf":
            raise BadRequest("supplied file was not in GGUF format")
        elif suffix not in BESIDE:
            raise BadRequest("unknown type")
    if files and not paths:
        raise BadRequest("supplied file was not in GGUF format")
    return paths


def _opened(names: list[str], paths: dict[str, Path]) -> GGUFFile:
    """Opens a file, or all parts of a split one. Errors name the user's file, not the blob."""
    try:
        file = GGUFFile.open(*(paths[name] for name in names))
    except GGUFError as error:
        raise GGUFError(names[0], error.field, error.offset, error.problem) from None
    if len(file.part_paths) != len(names):
        raise GGUFError(names[0], "split.count", 0, f"{len(names)} parts given, the file says {len(file.part_paths)}")
    return file


def _merge(blobs: BlobStore, file: GGUFFile) -> tuple[Digest, int]:
    """Writes the parts of an open split file into one blob, tensors and metadata unchanged; its digest and size."""
    total = sum(path.stat().st_size for path in file.part_paths)
    blobs.check_space(total)
    metadata = {key: file.metadata.typed(key) for key in file.metadata if not key.startswith("split.")}
    tensors = [(name, info.type, info.shape, partial(file.data, name)) for name, info in file.tensors.items()]
    digest = blobs.import_made(lambda path: write_gguf(path, metadata, tensors), "merge the parts of a model")
    return digest, blobs.path(digest).stat().st_size


def _layer(file: GGUFFile, digest: Digest, size: int) -> GGUFLayer:
    metadata = file.metadata
    architecture = str(metadata.get("general.architecture", "unknown"))
    file_type = metadata.get("general.file_type")
    return GGUFLayer(
        media_type=_media_type(metadata, architecture),
        digest=digest,
        size=size,
        architecture=architecture,
        num_parameters=sum(num_elements(tensor.shape) for tensor in file.tensors.values()),
        file_type=file_type_name(file_type) if isinstance(file_type, int) else "unknown",
        context_length=_integer(metadata, f"{architecture}.context_length"),
        embedding_length=_integer(metadata, f"{architecture}.embedding_length"),
    )


def _media_type(metadata: Mapping[str, Any], architecture: str) -> str:
    """Weights unless the file says that it is a LoRA adapter or an encoder of images or sound."""
    kind = metadata.get("general.type")
    if kind == "adapter":
        return manifests.ADAPTER
    has_blocks = _integer(metadata, f"{architecture}.block_count") > 0
    is_encoder = not has_blocks and _integer(metadata, f"{architecture}.vision.block_count") > 0
    if kind in ("projector", "mmproj") or architecture == "clip" or is_encoder:
        return manifests.PROJECTOR
    return manifests.MODEL


def _integer(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    return value if isinstance(value, int) else 0
