"""A forkserver whose engines are fakes that misbehave on demand: real processes and sockets, no torch, no model.

A fake engine's "model" is a JSON file of faults (see `Faults`), or a GGUF file whose `general.description` is that JSON.
Each generation yields tokens 1, 2, 3, ... of which `Faults.step_seconds` is the pace.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import msgspec

from ollamapy.engine import protocol
from ollamapy.engine.protocol import Caller, EngineInfo, Event, Finish, Output, Plan, SamplingParams, Stats, Step
from ollamapy.errors import BadRequest, UnsupportedModel
from ollamapy.gguf.reader import GGUFFile, is_gguf
from ollamapy.lifecycle import forkserver
from ollamapy.lifecycle.loop import Loop, Progress
from ollamapy.lifecycle.wire import Kill, encode

GARBAGE = {
    "a frame too large": (protocol.MAX_FRAME + 1).to_bytes(4, "little"),
    "no msgpack": b"\x01\0\0\0\xc1",
    "a message of another pipe": encode(Kill(1)),
    "a message for nobody": encode(Step([Output(10**9, [1])])) + encode(Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
}


class Faults(msgspec.Struct):
    """What goes wrong. A path named by `trace` gets a line per load and per abort: "load <pid>", "abort <time>"."""

    trace: str = ""
    load_seconds: float = 0.0  # with progress every 50 ms
    silent_load: str = ""  # of SILENT: without any progress, for `load_seconds` or until a lock is free
    hang_at_load: bool = False
    die_at_load: bool = False
    die_at_load_until: str = ""  # while this file exists
    raise_at_load: str = ""  # an UnsupportedModel with this text
    memory_error_at_load: bool = False
    step_seconds: float = 0.01
    die_at_token: int = 0
    raise_at_token: int = 0
    hang_at_token: int = 0
    memory_error_at_token: int = 0
    garbage: str = ""  # of GARBAGE, sent at the second token
    weight_bytes: int = 1000


def read_faults(path: Path) -> Faults:
    if not is_gguf(path):
        return msgspec.json.decode(path.read_bytes(), type=Faults)
    with GGUFFile.open(path) as file:
        return msgspec.json.decode(file.metadata.get("general.description", "{}"), type=Faults)


class FakeEngine:
    """Counts. `max_tokens` of a request bounds it; an empty prompt is refused."""

    def __init__(self, plan: Plan, faults: Faults, sock: socket.socket) -> None:
        self._plan, self._faults, self._sock = plan, faults, sock
        self._running: dict[int, tuple[int, int, int]] = {}  # request -> prompt tokens, most tokens, tokens so far
        self._embeds: list[tuple[int, list[int]]] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._embeds)

    def add(self, request_id: int, token_ids: list[int], params: SamplingParams, caller: Caller) -> None:
        if not token_ids:
            raise BadRequest("the prompt is empty")
        self._running[request_id] = (len(token_ids), params.max_tokens, 0)

    def embed(self, request_id: int, token_ids: list[int], caller: Caller) -> None:
        if not token_ids:
            raise BadRequest("nothing to embed")
        self._embeds.append((request_id, token_ids))

    def abort(self, request_id: int) -> None:
        self._running.pop(request_id, None)
        self.trace(f"abort {time.time()}")

    def step(self) -> list[Event]:
        time.sleep(self._faults.step_seconds)
        self._steps += 1
        events: list[Event] = [protocol.Embedding(i, b"\0\0\x80?" * 4, len(ids)) for i, ids in self._embeds]
        self._embeds.clear()
        outputs = [self._advance(request_id) for request_id in list(self._running)]
        return [*events, Step(outputs)] if outputs else events

    def _advance(self, request_id: int) -> Output:
        prompt, most, count = self._running[request_id]
        count += 1
        self._fault(count)
        self._running[request_id] = (prompt, most, count)
        finish = None
        if count == most:
            del self._running[request_id]
            finish = Finish("length", prompt, completion_tokens=count)
        return Output(request_id, [count], finish=finish)

    def _fault(self, count: int) -> None:
        if count == self._faults.die_at_token:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == self._faults.raise_at_token:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if count == self._faults.hang_at_token:
            time.sleep(1000)
        if count == self._faults.memory_error_at_token:
            raise MemoryError
        if count == 2 and self._faults.garbage:
            self._sock.sendall(GARBAGE[self._faults.garbage])

    def stats(self) -> Stats:
        return Stats(len(self._running), 0, 10, 0, 0, 10, 0, 0, 0, self._steps)

    def info(self) -> EngineInfo:
        plan, weights = self._plan, self._faults.weight_bytes
        sizes = plan.context_length, plan.num_blocks, plan.block_size, weights, 500, 0, 4, plan.max_context
        return EngineInfo("llama", plan.device, *sizes)

    def trace(self, line: str) -> None:
        if self._faults.trace:
            with open(self._faults.trace, "a") as file:
                file.write(line + "\n")


def wait_for_a_disk(seconds: float, path: Path) -> None:
    """In state D of proc_pid_stat(5), where the kernel has a parent wait for the child of vfork."""
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]  # clone
    vfork = 0x4000  # CLONE_VFORK of linux/sched.h: the child has memory of its own
    if ctypes.PyDLL(None).syscall(number, vfork | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        time.sleep(seconds)
        os._exit(0)
    os.wait()


def read_slowly(seconds: float, path: Path) -> None:
    end = time.monotonic() + seconds
    with path.open("rb", buffering=0) as file:
        while time.monotonic() < end and file.read(1):
            time.sleep(0.05)


def wait_for_a_compiler(seconds: float, path: Path) -> None:
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def wait_for_a_lock(seconds: float, path: Path) -> None:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


SILENT = {"disk": wait_for_a_disk, "reading": read_slowly, "compiler": wait_for_a_compiler, "lock": wait_for_a_lock}


def build(plan: Plan, progress: Progress, sock: socket.socket) -> FakeEngine:
    faults = read_faults(Path(plan.model_path))
    engine = FakeEngine(plan, faults, sock)
    engine.trace(f"load {os.getpid()} {json.dumps(msgspec.to_builtins(plan))}")
    if faults.hang_at_load:
        time.sleep(1000)
    if faults.die_at_load or (faults.die_at_load_until and Path(faults.die_at_load_until).exists()):
        os.kill(os.getpid(), signal.SIGKILL)
    if faults.raise_at_load:
        raise UnsupportedModel(faults.raise_at_load)
    if faults.memory_error_at_load:
        raise MemoryError
    if faults.silent_load:
        SILENT[faults.silent_load](faults.load_seconds, Path(plan.model_path))
        return engine
    end = time.monotonic() + faults.load_seconds
    while (left := end - time.monotonic()) > 0:
        progress("loading", int((1 - left / faults.load_seconds) * 100), 100)
        time.sleep(min(left, 0.05))
    return engine


def main(sock: socket.socket, plan: Plan) -> None:
    Loop(sock, plan, lambda plan, progress: build(plan, progress, sock)).run()


if __name__ == "__main__":
    forkserver.run(lambda: (main, ("cpu",)), sys.argv[1:])
