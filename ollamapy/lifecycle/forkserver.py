"""The process that engines are forked from: torch and the engine are imported once, nothing else is started.

`python -m ollamapy.lifecycle.forkserver <fd> <parent pid>`, started by `spawner.Spawner`. One thread, no OpenMP team,
no CUDA, so a fork is safe. It and its engines get SIGKILL when their parent dies. It knows nothing of models.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ollamapy.engine.protocol import Plan
from ollamapy.lifecycle.wire import Exited, Fork, Forked, FrameReader, Kill, Preloaded, SpawnRequest, encode

log = logging.getLogger(__name__)

EngineMain = Callable[[socket.socket, Plan], None]
MAX_FDS = 16  # file descriptors taken from one read; each Fork brings one
PR_SET_PDEATHSIG = 1  # linux/prctl.h
OOM_SCORE_ADJ = "500"  # when memory runs out, the kernel takes an engine before the daemon


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the thread that made it ends. Exits when `parent` is gone already.

    Elsewhere than on Linux the end of the socket does the same, at the engine's next read or write.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


class Forkserver:
    """Reads Fork and Kill from the daemon; answers Forked and Exited."""

    def __init__(self, daemon: socket.socket, main: EngineMain) -> None:
        self._daemon, self._main = daemon, main
        self._reader: FrameReader[SpawnRequest] = FrameReader(SpawnRequest)
        self._fds: list[int] = []  # received, for Fork requests not yet complete; in their order
        self._children: set[int] = set()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Until the daemon closes its end."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must exist for the wake-up byte to be written
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._daemon, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                    self._reap()
                if self._daemon.fileno() in ready and not self._read():
                    return

    def _read(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._daemon, 1 << 16, MAX_FDS)
        self._fds += fds
        for request in self._reader.feed(data):
            if isinstance(request, Fork):
                self._fork(request, self._fds.pop(0))
            elif isinstance(request, Kill) and request.pid in self._children:
                os.kill(request.pid, signal.SIGKILL)
        return bool(data)

    def _fork(self, request: Fork, fd: int) -> None:
        parent = os.getpid()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_engine(parent, fd, request.plan)  # does not return
        os.close(fd)
        self._children.add(pid)
        self._daemon.sendall(encode(Forked(request.ticket, pid)))

    def _become_engine(self, parent: int, fd: int, plan: Plan) -> None:
        code = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self._wake_read, self._wake_write, *self._fds):
                os.close(other)
            self._daemon.close()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):  # not Linux, or not allowed
                Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ)
            self._main(socket.socket(fileno=fd), plan)
            code = 0
        except BaseException:
            log.exception("engine process %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(code)  # the forkserver's stack must not go on in the child

    def _reap(self) -> None:
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                self._daemon.sendall(encode(Exited(pid, os.waitstatus_to_exitcode(status))))


def num_threads() -> int:
    """Threads of this process."""
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        return 1


def run(preload: Callable[[], tuple[EngineMain, tuple[str, ...]]], arguments: list[str]) -> None:
    """The process's whole life. `arguments`: socket fd, parent pid, logging level. `preload` does the imports and gives
    what engines run and `Preloaded.packed_on`."""
    fd, parent, level = (int(argument) for argument in arguments)
    die_with_parent(parent)
    # Ctrl+C and a service manager's SIGTERM reach the whole group; the daemon decides when engines end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s")
    start = time.monotonic()
    gc.disable()  # an import leaves 7,000 objects of garbage; looking for them again and again took 0.35 of its 1.3 s
    main, packed_on = preload()
    gc.freeze()  # what is imported stays shared with the engines: no collection touches its pages
    gc.enable()
    with socket.socket(fileno=fd) as daemon, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        daemon.sendall(encode(Preloaded(time.monotonic() - start, num_threads(), packed_on)))
        Forkserver(daemon, main).serve()


def _preload() -> tuple[EngineMain, tuple[str, ...]]:
    worker = importlib.import_module("ollamapy.lifecycle.worker")  # torch: only in this process
    return worker.main, worker.packed_on()


def main() -> None:
    run(_preload, sys.argv[1:])


if __name__ == "__main__":
    main()
