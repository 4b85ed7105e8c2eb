"""The daemon's side of the forkserver: starts it, asks it for engine processes, hears of their ends. Knows no models."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from ollamapy.engine.protocol import Plan
from ollamapy.env import child_environment
from ollamapy.errors import EngineError
from ollamapy.lifecycle.wire import Exited, Fork, Forked, FrameReader, Kill, Preloaded, SpawnReply, encode, socketpair

log = logging.getLogger(__name__)

# As `python -m ollamapy.lifecycle.forkserver`, but a torch.py or random.py in the folder where the user started the
# daemon is not imported (-P), and a package that runs from a source tree is found.
_ROOT = str(Path(__file__).parents[2])
_START = f"import sys; sys.path.append({_ROOT!r}); from ollamapy.lifecycle.forkserver import main; main()"
COMMAND = (sys.executable, "-P", "-c", _START)
ENVIRONMENT = {
    # No threads before the fork, or the OpenMP of an engine hangs: OpenBLAS starts its own when numpy is imported, and any
    # torch operation on import starts a team. An engine sets its number by its plan.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A team that spins 300,000 times at each barrier (libgomp's default) starves itself when other programs use a core:
    # on 2 cores under a load of 7 a token of SmolLM2 took 0.6-1.8 s, with this 0.13 s and a quarter of the CPU time.
    "GOMP_SPINCOUNT": "1000",
    # "cuda:1" is then the same card for NVML (placement) and for CUDA (the engine).
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class _Link:
    """One forkserver process and its socket. All waits end when it ends. It is heard once it is attached to an event loop."""

    def __init__(self, command: tuple[str, ...]) -> None:
        ours, theirs = socketpair()
        environment = child_environment(**ENVIRONMENT)
        level = logging.getLogger().getEffectiveLevel()
        with theirs:
            arguments = [*command, str(theirs.fileno()), str(os.getpid()), str(level)]
            self.process = subprocess.Popen(arguments, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment)
        ours.setblocking(False)
        self._socket = ours
        self._reader: FrameReader[SpawnReply] = FrameReader(SpawnReply)
        self._tickets = itertools.count(1)
        self._forks: dict[int, asyncio.Future[tuple[int, asyncio.Future[int]]]] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self.preloaded: asyncio.Future[Preloaded]
        self.alive = True
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """To the running loop. Idempotent."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.preloaded = self._loop.create_future()
            self._loop.add_reader(self._socket.fileno(), self._readable)

    async def fork(self, plan: Plan, engine: socket.socket) -> tuple[int, asyncio.Future[int]]:
        """Process id, and the future of its exit code. A fork that is cancelled is killed when it comes."""
        ticket = next(self._tickets)
        future: asyncio.Future[tuple[int, asyncio.Future[int]]] = asyncio.get_running_loop().create_future()
        self._forks[ticket] = future
        self._send(encode(Fork(ticket, plan)), engine)
        return await future

    def kill(self, pid: int) -> None:
        if self.alive and pid in self._exits:
            self._socket.sendall(encode(Kill(pid)))

    def _send(self, frame: bytes, engine: socket.socket) -> None:
        # A frame is under 1 KiB and the forkserver reads at once; only before it has imported torch can the
        # buffer (200 KiB) fill up, by hundreds of loads, which Residents does one at a time.
        assert len(frame) < 1 << 16
        try:
            sent = socket.send_fds(self._socket, [frame], [engine.fileno()])
        except OSError as error:
            raise EngineError(f"cannot start an engine process: {error}") from error
        assert sent == len(frame)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        for reply in self._reader.feed(data):
            self._take(reply)

    def _take(self, reply: SpawnReply) -> None:
        if isinstance(reply, Forked):
            exited = self._exits[reply.pid] = asyncio.get_running_loop().create_future()
            future = self._forks.pop(reply.ticket)
            if future.cancelled():
                self.kill(reply.pid)
            else:
                future.set_result((reply.pid, exited))
        elif isinstance(reply, Exited):
            self._exits.pop(reply.pid).set_result(reply.code)
        else:
            log.info("engines can start: imports took %.1f s", reply.seconds)
            if reply.num_threads != 1:
                log.error("an import started threads (%d are there): engines forked from them may hang", reply.num_threads)
            self.preloaded.set_result(reply)

    def close(self) -> None:
        """Kills the forkserver, and with it its engines. Idempotent; also how its own death is handled."""
        if not self.alive:
            return
        self.alive = False
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self.process.kill()
        code = self.process.wait()  # at once: it is dead or has SIGKILL
        if self._loop is None:
            return
        error = EngineError(f"the process that starts engines ended with status {code}; see the server's log")
        for fork in self._forks.values():
            if not fork.done():
                fork.set_exception(error)
        for ended in self._exits.values():
            ended.set_result(-9)  # PDEATHSIG
        if not self.preloaded.done():
            self.preloaded.cancel()


class Spawner:
    """Starts engine processes. The forkserver imports torch while the daemon already answers; a spawn waits for it."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self._command = command
        self._link: _Link | None = None

    def launch(self) -> None:
        """Starts the forkserver if none runs; does not wait for its imports. Call on the thread of the event loop, which need
        not run yet: the kernel kills the forkserver when the thread that started it ends."""
        if self._link is None or not self._link.alive:
            if self._link is not None:
                log.warning("the process that starts engines has died; starting another")
            self._link = _Link(self._command)

    def start(self) -> None:
        """The same on the running event loop, which hears of the forkserver from now on."""
        self.launch()
        assert self._link is not None
        self._link.attach()

    async def ready(self) -> Preloaded:
        """Waits for the imports."""
        self.start()
        assert self._link is not None
        try:
            return await asyncio.shield(self._link.preloaded)
        except asyncio.CancelledError:
            if self._link.alive:
                raise
            raise EngineError("the process that starts engines cannot start; see the server's log") from None

    async def spawn(self, plan: Plan) -> tuple[socket.socket, Engine]:
        """The daemon's end of a new engine's socket, and the process. Raises EngineError."""
        self.start()
        link = self._link
        assert link is not None
        ours, theirs = socketpair()
        try:
            with theirs:
                pid, exited = await link.fork(plan, theirs)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return ours, Engine(pid, exited, link)

    @property
    def pid(self) -> int | None:
        return self._link.process.pid if self._link is not None and self._link.alive else None

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class Engine:
    """A forked process."""

    def __init__(self, pid: int, exited: asyncio.Future[int], link: _Link) -> None:
        self.pid, self._exited, self._link = pid, exited, link

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._link.kill(self.pid)

    async def exit_code(self, timeout: float) -> int | None:
        """Exit code, minus the signal when killed; None when it has not ended within `timeout` seconds."""
        done, _ = await asyncio.wait([self._exited], timeout=timeout)
        return self._exited.result() if done else None
