"""What is collected and what is kept: blobs that are held, leased, or another process's; and many threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ollamapy.store.blobs import BlobStore
from ollamapy.store.digest import Digest
from ollamapy.store.library import Library
from ollamapy.store.manifests import MODEL, Layer, Manifest
from tests.store.stores import age, leftovers, make, name, violations


def test_prune(library: Library) -> None:
    make(library, "a")
    orphan, _ = BlobStore(library.root).add(b"orphan")
    os.rename(library.blobs.path(Digest.of(b"weights")), library.blobs.folder / Digest.of(b"weights").text)
    (library.blobs.folder / "sha256-12-partial").write_text("x")
    (library.root / "manifests" / ".new-12").write_text("x")
    (library.root / "manifests" / "h" / "n" / "m").mkdir(parents=True)
    age(library)
    young, _ = BlobStore(library.root).add(b"young")
    library.prune()
    assert not library.blobs.has(orphan) and library.blobs.has(young)
    assert library.open(name("a")).model_path is not None and violations(library.root) == [] and leftovers(library.root) == []
    assert not (library.root / "manifests" / "h").exists()


def test_noprune(library: Library) -> None:
    library.noprune = True
    make(library, "a", system="one")
    make(library, "a", system="two")
    orphan, _ = BlobStore(library.root).add(b"orphan")
    os.rename(library.blobs.path(Digest.of(b"weights")), library.blobs.folder / Digest.of(b"weights").text)
    age(library)
    library.prune()
    assert library.blobs.has(orphan) and library.blobs.has(Digest.of(b"one")) and violations(library.root) == []
    library.delete(name("a"))  # a delete always removes what was the model's
    assert not library.blobs.has(Digest.of(b"two")) and library.blobs.has(Digest.of(b"one"))


def test_held_and_leased_blobs_are_kept(library: Library) -> None:
    make(library, "a")
    weights = Digest.of(b"weights")
    with library.lease([weights]):
        library.delete(name("a"))
        assert library.blobs.has(weights)
        make(library, "b")
    library.delete(name("b"))
    assert not library.blobs.has(weights)
    library.hold(weights)
    make(library, "c")  # the hold ends here
    library.delete(name("c"))
    assert not library.blobs.has(weights)
    library.hold(weights)
    manifest = make(library, "d", weights=b"something else")
    library.blobs.add(b"weights")
    library.write(name("e"), Manifest(manifest.config, [Layer(MODEL, Digest.of(b"something else").text, 14)]))
    age(library)
    library.prune()
    assert library.blobs.has(weights)


def test_what_a_lease_wrote_outlives_other_models_of_it(library: Library) -> None:
    """Another thread makes and deletes a model of the same bytes between the writing of a blob and of its manifest."""

    def other() -> None:
        make(library, "other", weights=b"same")
        library.delete(name("other"))

    for add in (library.blobs.add, lambda data: _ingest(library, data)):
        with library.lease():
            add(b"same")
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert library.blobs.has(Digest.of(b"same"))
        make(library, "last", weights=b"same")
        library.delete(name("last"))
        assert not library.blobs.has(Digest.of(b"same"))


def _ingest(library: Library, data: bytes) -> None:
    with library.blobs.ingest() as writer:
        writer.write(data)


def test_holds_end(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, _ = library.blobs.add(b"uploaded")
    age(library)
    library.prune()
    assert library.blobs.has(digest)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    make(library, "a")
    library.prune()
    assert not library.blobs.has(digest)


OTHER_PROCESS = """
import sys
from pathlib import Path
from ollamapy.store.library import Library
library = Library(Path(sys.argv[1]))
with library.lease():
    digest, _ = library.blobs.add(b"weights")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_another_process_at_work_stops_collection(library: Library) -> None:
    make(library, "a")
    command = [sys.executable, "-c", OTHER_PROCESS, str(library.root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        library.delete(name("a"))
        assert library.blobs.has(Digest.of(b"weights")) and library.list() == []
        other.communicate("\n")
    make(library, "b")
    library.delete(name("b"))
    assert not library.blobs.has(Digest.of(b"weights"))


def test_many_threads(library: Library) -> None:
    """Threads make, copy and delete models that share blobs; no step may ever see a model with a blob missing."""
    errors: list[Exception] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(index: int) -> None:
        try:
            for step in range(12):
                own = f"m{index}"
                make(library, own, weights=b"shared" if step % 2 else b"w%d" % (index % 2), system=str(step % 3))
                library.copy(name(own), name(f"copy{index}"))
                assert library.open(name(own)).model_path is not None
                library.delete(name(own))
                for summary in library.list():
                    assert summary.size > 0
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert errors == [] and violations(library.root) == [] and leftovers(library.root) == []
    used = set[Digest]().union(*(library.open(model.name).manifest.blobs() for model in library.list()))
    for model in library.list():
        library.delete(model.name)
    assert len(used) > 2 and list(library.blobs.digests()) == []
