"""Small models for store tests, and what must hold of a store at any time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from ollamapy.names import ModelName
from ollamapy.store.library import Library
from ollamapy.store.manifests import CONFIG_TYPE, MODEL, SYSTEM, ConfigBlob, Layer, Manifest


def name(text: str) -> ModelName:
    return ModelName.parse(text)


def make(library: Library, text: str, *, weights: bytes = b"weights", system: str = "") -> Manifest:
    """Writes a model, blobs first, as a create does: large blobs through the writer, small ones through `add`."""
    with library.lease():
        with library.blobs.ingest(size=len(weights)) as writer:
            for start in range(0, len(weights), 1000):
                writer.write(weights[start : start + 1000])
        assert writer.digest is not None
        layers = [Layer(MODEL, writer.digest.text, writer.size)]
        if system:
            digest, _ = library.blobs.add(system.encode())
            layers.append(Layer(SYSTEM, digest.text, len(system.encode())))
        config = ConfigBlob(model_format="gguf", model_family="llama", model_type="1B", file_type="Q8_0").encode()
        digest, _ = library.blobs.add(config)
        manifest = Manifest(Layer(CONFIG_TYPE, digest.text, len(config)), layers)
        library.write(name(text), manifest)
    return manifest


def violations(root: Path, *, partial_models: bool = False) -> list[str]:
    """What is wrong with the files of a store, found without the package: content of blobs, manifests, references.

    With `partial_models`, blobs that a manifest refers to may be missing.
    """
    problems = []
    blobs = {path.name: path for path in (root / "blobs").glob("*")}
    for blob, path in blobs.items():
        if blob.startswith("sha256-") and hashlib.sha256(path.read_bytes()).hexdigest() != blob.removeprefix("sha256-"):
            problems.append(f"{blob[:19]} has other content")
    for path in (root / "manifests").glob("*/*/*/*"):
        try:
            manifest = json.loads(path.read_bytes())
            layers = [manifest["config"], *manifest["layers"]]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"manifest {path.name} is broken: {error}")
            continue
        for layer in layers:
            blob_path = blobs.get(layer["digest"].replace(":", "-"))
            if blob_path is None:
                if not partial_models:
                    problems.append(f"manifest {path.name} refers to a missing blob")
            elif blob_path.stat().st_size != layer["size"]:
                problems.append(f"manifest {path.name} has another size than its blob")
    return problems


def state(root: Path) -> dict[str, str]:
    """Model (namespace/model:tag) -> SHA-256 of its manifest."""
    found = {}
    for path in (root / "manifests").glob("*/*/*/*"):
        _, namespace, model, tag = path.relative_to(root / "manifests").parts
        found[f"{namespace}/{model}:{tag}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leftovers(root: Path) -> list[str]:
    """Files that are neither blobs nor manifests nor the lock."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return [p.name for p in found if not p.name.startswith("sha256-") and len(p.relative_to(root).parts) != 5]


def age(library: Library, seconds: float = 4000) -> None:
    """As if all files had been written so long ago."""
    for path in library.root.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)
