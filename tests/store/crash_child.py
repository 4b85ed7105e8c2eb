"""Forks processes that work in a store, and kills them: `python -m tests.store.crash_child ROOT LOG`.

Reads lines `SEED MICROSECONDS` from stdin; for each, a fork makes, copies, replaces, deletes and prunes models until it
is killed that much later. The fork writes to LOG, unbuffered: `B name` before an operation on a name, and `A name
manifest-sha256` (or `-`) when it was acknowledged. Answers `ok` on stdout once the fork is dead.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

from ollamapy.store import library as module
from ollamapy.store.library import Library
from tests.store.stores import make, name

NAMES = ("a", "b", "me/c", "d:1", "host:1/n/e")


def main(root: Path, log: Path) -> None:
    module.PRUNE_AGE = 0.0  # nothing else works in the store
    for line in sys.stdin:
        seed, microseconds = map(int, line.split())
        pid = os.fork()
        if pid == 0:
            work(Library(root), random.Random(seed), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        time.sleep(microseconds / 1e6)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print("ok" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else f"ended: {status}", flush=True)


def work(library: Library, rng: random.Random, log: int) -> None:
    try:
        while True:
            operate(library, rng, log)
    except BaseException as error:
        os.write(log, f"E {error!r}\n".encode())
    finally:
        os._exit(1)


def operate(library: Library, rng: random.Random, log: int) -> None:
    operation, target = rng.choice(("create", "create", "copy", "delete", "prune", "import")), rng.choice(NAMES)
    stored = list(library.manifests.names())
    if operation in ("copy", "delete") and not stored:
        operation = "create"
    if operation == "delete":
        target = rng.choice(stored).short()
    os.write(log, f"B {target}\n".encode())
    if operation == "create":
        make(library, target, weights=rng.randbytes(rng.choice((10, 5000, 300_000))), system=rng.choice(("", "x", "y")))
    elif operation == "copy":
        library.copy(rng.choice(stored), name(target))
    elif operation == "delete":
        library.delete(name(target))
    elif operation == "import":
        library.blobs.import_file(Path(__file__))
    else:
        library.prune()
    path = library.manifests.path(name(target))
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "-"
    os.write(log, f"A {target} {digest}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
