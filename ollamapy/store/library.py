"""The models of a store: list, open, write, copy, delete, prune. Knows nothing of requests, templates or weights.

Order of commits: a manifest is written after its blobs and removed before them. What is acknowledged is durable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ollamapy.errors import NotFound, StoreError
from ollamapy.names import ModelName
from ollamapy.store.blobs import BlobStore
from ollamapy.store.digest import Digest
from ollamapy.store.fsops import FileOps
from ollamapy.store.leases import Leases
from ollamapy.store.local import LocalModel, ModelSummary, load, read_config
from ollamapy.store.manifests import Manifest, ManifestStore, StoredManifest

__all__ = ["Library", "LocalModel", "ModelSummary"]

log = logging.getLogger(__name__)

PRUNE_AGE = 3600.0  # seconds; younger files may belong to a pull or create of another program


class Library:
    """The model store in a folder (OLLAMA_MODELS): one object per process, for any number of threads.

    Other processes may use the folder at the same time.
    """

    def __init__(self, root: Path, fs: FileOps | None = None, *, noprune: bool = False) -> None:
        self.root = root
        self.fs = fs or FileOps()
        self.noprune = noprune
        self.leases = Leases(root, self.fs)
        self.blobs = BlobStore(root, self.fs, hold=self.leases.hold)
        self.manifests = ManifestStore(root, self.fs)

    def list(self) -> list[ModelSummary]:
        """All models, newest first. An unreadable manifest is left out with a warning."""
        found = []
        for stored in self._readable():
            try:
                config = read_config(self.blobs, stored.manifest)
            except StoreError as error:
                log.warning("leaving out %s: %s", stored.name.short(), error)
                continue
            found.append(ModelSummary(stored.name, stored.digest, stored.manifest.size, stored.modified_at, config))
        return sorted(found, key=lambda model: model.modified_at, reverse=True)

    def resolve(self, name: ModelName) -> ModelName | None:
        """The name as stored (case may differ), keeping what was given; None when there is no such model."""
        stored = self.manifests.find(name)
        if stored is not None and stored is not name:
            host, namespace, model, tag = stored.parts
            return ModelName(model, tag=tag, namespace=namespace, host=host, scheme=name.scheme, given=name.given)
        return stored

    def open(self, name: ModelName) -> LocalModel:
        """NotFound ("model 'x' not found"); StoreError when a text or the size of a blob is not what it should be."""
        return load(self.blobs, self._stored(name))

    def write(self, name: ModelName, manifest: Manifest) -> None:
        """Gives a model this manifest, then removes what its old one alone referred to.

        Every blob must be there already (StoreError). When this returns, the model survives a power cut.
        """
        blobs = manifest.blobs()
        with self.leases.changing():
            for layer in [manifest.config, *manifest.layers]:
                if self.blobs.size(layer.blob) != layer.size:
                    raise StoreError(f"blob {layer.digest[:19]} is missing or does not have {layer.size} bytes")
            target = self.manifests.find(name) or name
            old = self._mentions(target)
            self.manifests.write(target, manifest.encode())
            self.leases.release(blobs)
            if not self.noprune:
                self._collect(old - blobs)

    def copy(self, source: ModelName, destination: ModelName) -> None:
        """The same manifest, byte for byte, under another name. NotFound; no-op when both are the same model."""
        with self.leases.changing():
            stored = self._stored(source)
            target = self.manifests.find(destination) or destination
            if target == stored.name:
                return
            old = self._mentions(target)
            self.manifests.write(target, stored.data)
            if not self.noprune:
                self._collect(old - stored.manifest.blobs())

    def delete(self, name: ModelName) -> None:
        """Removes the manifest, then the blobs that no other refers to. NotFound. Works on damaged manifests too."""
        with self.leases.changing():
            stored = self.manifests.find(name)
            if stored is None:
                raise NotFound(f"model '{name.given}' not found")
            old = self._mentions(stored)
            self.manifests.remove(stored)
            self._collect(old)

    def prune(self) -> None:
        """At start: repairs old blob names; removes unreferenced blobs and temporary files older than an hour, and
        empty folders. Removes no blob while any manifest is damaged."""
        with self.leases.changing():
            self.blobs.repair_names()
            if self.noprune:
                return
            self.blobs.remove_stale(PRUNE_AGE)
            self.manifests.remove_empty(PRUNE_AGE)
            if sum(1 for _ in self._readable()) == sum(1 for _ in self.manifests.names()):
                self._collect({digest for digest in self.blobs.digests() if self.blobs.older(digest, PRUNE_AGE)})
            else:
                log.warning("not removing unused blobs, because a manifest is damaged")

    def lease(self, digests: Iterable[Digest] = ()) -> AbstractContextManager[None]:
        """Around the making of a model: while it is open, its blobs are not removed. See `Leases.lease`."""
        return self.leases.lease(digests)

    def hold(self, digest: Digest) -> None:
        """A client was told that this blob is there: keep it for an hour, or until a model has it. Writing holds too."""
        self.leases.hold(digest)

    def close(self) -> None:
        """Lets go of the store's lock file. The library can be used again, and opens it again."""
        self.leases.close()

    def check(self, *, deep: bool = False) -> Sequence[str]:
        """What is wrong with the store, one line each: damaged manifests, missing blobs, and with `deep` wrong content."""
        problems, sizes = [], dict[Digest, int]()
        for name in self.manifests.names():
            try:
                manifest = self.manifests.read(name).manifest
            except (StoreError, NotFound) as error:
                problems.append(str(error))
                continue
            for layer in [manifest.config, *manifest.layers]:
                sizes[layer.blob] = layer.size
                if self.blobs.size(layer.blob) != layer.size:
                    problems.append(f"{name.short()}: blob {layer.digest[:19]} is missing or does not have {layer.size} bytes")
        if deep:
            damaged = (digest for digest in self.blobs.digests() if not self.blobs.verify(digest))
            problems += [f"blob {digest.text[:19]} does not have the content its name says" for digest in damaged]
        return problems

    def _stored(self, name: ModelName) -> StoredManifest:
        resolved = self.resolve(name)
        if resolved is None:
            raise NotFound(f"model '{name.given}' not found")
        return self.manifests.read(resolved)

    def _readable(self) -> Iterator[StoredManifest]:
        for name in self.manifests.names():
            try:
                yield self.manifests.read(name)
            except (StoreError, NotFound) as error:
                log.warning("leaving out a model: %s", error)

    def _mentions(self, name: ModelName) -> set[Digest]:
        return self.manifests.mentions(name) if self.manifests.path(name).is_file() else set()

    def _collect(self, candidates: set[Digest]) -> None:
        """Removes those of the blobs that no manifest mentions and that nobody uses. What cannot be removed stays."""
        if not candidates:
            return
        with self.leases.collecting() as allowed:
            if not allowed:
                log.info("keeping unused blobs: another process is at work in the store")
                return
            try:
                for name in self.manifests.names():
                    candidates = candidates - self.manifests.mentions(name)
                for digest in candidates:
                    if not self.leases.in_use(digest):
                        self.blobs.delete(digest)
            except StoreError as error:  # the change itself is done; unused blobs wait for the next start
                log.warning("keeping unused blobs: %s", error)
