"""Crashes, full disks, I/O errors and power cuts at every file operation, and kill -9 at random moments.

Held to: what was acknowledged stays whole; no broken manifest; no file with a digest's name and other content; errors are
StoreErrors, leave no temporary file and do not stand in the way of the next attempt.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ollamapy.errors import StoreError
from ollamapy.store import library as library_module
from ollamapy.store.blobs import BlobStore
from ollamapy.store.fsops import FileOps
from ollamapy.store.library import Library
from tests.store.faults import CHANGES, Crash, Faults, Recorder, ShortWrites, after_power_cut
from tests.store.stores import leftovers, make, name, state, violations

ROOT = Path(__file__).parents[2]
KILLS = 200


def prepare(root: Path, fs: FileOps | None = None) -> None:
    """Three models that share blobs, an unreferenced blob, and a file to import beside the store."""
    library = Library(root, fs)
    make(library, "a", weights=b"A" * 2500, system="shared")
    make(library, "b", weights=b"B" * 10, system="shared")
    library.copy(name("a"), name("c"))
    library.close()
    BlobStore(root, fs).add(b"orphan")
    (root.parent / "local.gguf").write_bytes(b"local" * 1000)


OPERATIONS: dict[str, Callable[[Library], object]] = {
    "create": lambda library: make(library, "host:1/ns/new", weights=b"N" * 3500, system="new"),
    "replace": lambda library: make(library, "a", weights=b"R" * 3500, system="other"),
    "replace sharing": lambda library: make(library, "b", weights=b"A" * 2500, system="shared"),
    "copy": lambda library: library.copy(name("a"), name("d")),
    "copy over": lambda library: library.copy(name("a"), name("b")),
    "delete": lambda library: library.delete(name("b")),
    "delete shared": lambda library: library.delete(name("c")),
    "import": lambda library: library.blobs.import_file(library.root.parent / "local.gguf"),
    "prune": lambda library: library.prune(),
}


@pytest.fixture(autouse=True)
def _prune_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "PRUNE_AGE", 0.0)


@pytest.fixture
def prepared(memory: Path) -> Path:
    prepare(memory / "prepared" / "models")
    return memory / "prepared"


class Trial:
    """A fresh copy of the prepared store, with the states before and after the operation."""

    def __init__(self, prepared: Path, operation: str) -> None:
        self.prepared, self.operate = prepared, OPERATIONS[operation]
        self.before = state(prepared / "models")
        self.number = 0
        library = Library(self.copy())
        self.operate(library)
        library.close()
        self.after = state(library.root)

    def copy(self) -> Path:
        self.number += 1
        target = self.prepared.parent / f"trial{self.number}"
        shutil.copytree(self.prepared, target)
        return target / "models"

    def check(self, root: Path) -> None:
        """The store is whole and is as before or as after; recovery changes no model; the operation then works."""
        found = state(root)
        assert violations(root) == []
        assert found in (self.before, self.after)
        library = Library(root)
        library.prune()
        assert state(root) == found and violations(root) == [] and leftovers(root) == []
        assert library.check(deep=True) == []
        if found == self.before:
            self.operate(library)
            assert state(root) == self.after and violations(root) == []
        library.close()
        shutil.rmtree(root.parent)


@pytest.mark.parametrize("fault", ["crash", "torn"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_crash_at_every_operation(prepared: Path, operation: str, fault: str) -> None:
    trial, at, fired = Trial(prepared, operation), 0, set[str]()
    while True:
        faults = Faults(at, fault)
        library = Library(trial.copy(), faults)
        try:
            trial.operate(library)
        except Crash:
            assert faults.fired
            fired.add(faults.fired)
        library.close()
        trial.check(library.root)
        if not faults.fired:
            break
        at += 1
    assert at >= (2 if operation in ("prune", "delete shared") else 5) and fired <= set(CHANGES)


ERRORS = [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False), (errno.EDQUOT, True), (errno.EMFILE, False)]


@pytest.mark.parametrize(
    ("number", "lasting"), ERRORS, ids=lambda value: errno.errorcode.get(value) or ("once", "lasting")[value]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_error_at_every_operation(prepared: Path, operation: str, number: int, lasting: bool) -> None:
    trial, at = Trial(prepared, operation), 0
    while True:
        faults = Faults(at, number, lasting)
        library = Library(trial.copy(), faults)
        failed = False
        try:
            trial.operate(library)
        except StoreError as error:
            failed = True
            assert str(library.root) not in str(error) and str(error).startswith("cannot ")
            assert number != errno.ENOSPC or "no space left on the disk of the model store" in str(error)
        assert failed or state(library.root) == trial.after or faults.fired in ("fsync_dir", "unlink")
        if not lasting and faults.fired != "unlink":
            assert leftovers(library.root) == []
        library.close()
        trial.check(library.root)
        if not faults.fired:
            break
        at += 1
    assert at >= 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_short_writes(prepared: Path, operation: str) -> None:
    trial = Trial(prepared, operation)
    library = Library(trial.copy(), ShortWrites())
    trial.operate(library)
    library.close()
    assert state(library.root) == trial.after
    trial.check(library.root)


STATES_PER_PREFIX = 6


def test_power_cut_at_every_step(memory: Path) -> None:
    """From the trace of a session, every prefix with random choices of what had not reached the disk."""
    fs = Recorder(memory / "models")
    fs.root.mkdir()
    library, expected = Library(fs.root, fs), [state(fs.root)]

    def act(operation: Callable[[], object]) -> None:
        fs.mark("begin")
        operation()
        fs.mark("end")
        expected.append(state(fs.root))

    act(lambda: make(library, "a", weights=b"A" * 1500, system="shared"))
    act(lambda: make(library, "b", weights=b"B", system="shared"))
    act(lambda: library.copy(name("a"), name("ns/c")))
    act(lambda: make(library, "a", weights=b"R" * 1500))
    act(lambda: library.delete(name("b")))
    act(lambda: library.copy(name("a"), name("ns/c")))
    act(lambda: library.delete(name("ns/c")))
    act(lambda: make(library, "b", weights=b"again", system="shared"))
    library.close()
    rng, count = random.Random(1), 0
    for end in range(1, len(fs.steps) + 1):
        prefix = fs.steps[:end]
        done = sum(step == ("mark", "end", "", -1, (0, b"")) for step in prefix)
        allowed = [expected[done]]
        if prefix.count(fs.steps[0]) > done:
            allowed.append(expected[done + 1])
        for _ in range(STATES_PER_PREFIX):
            root = memory / "disk"
            folders, files = after_power_cut([step for step in prefix if step.kind != "mark"], rng)
            for folder in sorted(folders):
                (root / folder).mkdir(exist_ok=True)
            for path, content in files.items():
                (root / path).write_bytes(content)
            assert violations(root) == []
            assert state(root) in allowed
            recovered = Library(root)
            recovered.prune()
            assert violations(root) == [] and leftovers(root) == [] and state(root) in allowed
            recovered.close()
            shutil.rmtree(root)
            count += 1
    assert count > 500


@pytest.mark.parametrize("skipped", ["fsync", "fsync_dir"])
def test_the_power_cut_test_can_fail(memory: Path, skipped: str) -> None:
    """Without its fsyncs the store does lose models in that simulation."""

    class Careless(Recorder):
        pass

    setattr(Careless, skipped, lambda self, path: None)
    fs = Careless(memory / "models")
    fs.root.mkdir()
    library = Library(fs.root, fs)
    make(library, "a", weights=b"A" * 1500)
    library.close()
    wanted, bad, rng = state(fs.root), 0, random.Random(1)
    for trial in range(50):
        root = memory / f"disk{trial}"
        folders, files = after_power_cut(fs.steps, rng)
        for folder in sorted(folders):
            (root / folder).mkdir(exist_ok=True)
        for path, content in files.items():
            (root / path).write_bytes(content)
        bad += violations(root) != [] or state(root) != wanted
    assert bad > 10


def expected_states(log: str) -> tuple[dict[str, str], str]:
    """From a log: manifest of each name after the last acknowledgement ("-" for none), and the name being worked on."""
    acknowledged: dict[str, str] = {}
    working = ""
    for line in log.splitlines():
        kind, model, *rest = line.split(" ")
        assert kind in "AB", line
        working = model if kind == "B" else ""
        if kind == "A":
            acknowledged[name(model).short()] = rest[0]
    return acknowledged, working and name(working).short()


def test_kill_at_random_moments(memory: Path) -> None:
    root, log = memory / "models", memory / "log"
    log.touch()
    command = [sys.executable, "-m", "tests.store.crash_child", str(root), str(log)]
    rng, amid, acknowledged = random.Random(7), 0, dict[str, str]()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdin is not None and child.stdout is not None
        for trial in range(KILLS):
            offset = log.stat().st_size
            child.stdin.write(f"{trial} {rng.randrange(500, 20_000)}\n")
            child.stdin.flush()
            assert child.stdout.readline() == "ok\n", log.read_text()[offset:]
            news, working = expected_states(log.read_text()[offset:])
            acknowledged.update(news)
            amid += bool(working)
            found = {text.removeprefix("library/"): digest for text, digest in _by_short_name(root).items()}
            assert violations(root) == [], trial
            for model, digest in acknowledged.items():
                if model == working:  # may be done or not
                    continue
                assert found.get(model, "-") == digest, (trial, model)
            if working:
                acknowledged[working] = found.get(working, "-")
        child.stdin.close()
    operations = log.read_text().count("A ")
    print(f"{KILLS} kills, {amid} amid an operation, {operations} operations done")
    assert amid > KILLS // 3, "the kills must hit operations"
    assert operations > KILLS // 3, "operations must be done between the kills"
    library = Library(root)
    library.prune()
    assert library.check(deep=True) == [] and leftovers(root) == []
    library.close()


def _by_short_name(root: Path) -> dict[str, str]:
    library = Library(root)
    return {model.name.short(): model.digest for model in library.list()}


def test_start_of_a_store_process_is_fast() -> None:
    """A child process that opens the store must not cost more than a tenth of a second or so of CPU."""
    start = os.times()
    subprocess.run([sys.executable, "-c", "import ollamapy.store.library"], check=True, cwd=ROOT)
    used = os.times().children_user - start.children_user + os.times().children_system - start.children_system
    assert used < 0.5, time.asctime()
