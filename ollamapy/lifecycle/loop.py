"""The life of an engine process around its engine: load, then commands in, steps, events out, until the daemon lets go.

Knows no torch and no model: `build` makes the engine. One thread; commands are taken between steps, and an engine
without work blocks on the socket, so it costs no CPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from ollamapy.engine import protocol
from ollamapy.engine.protocol import Abort, Command, Embed, Embedding, Event, Generate, GetStats, Output, Plan, Step
from ollamapy.errors import OllamapyError, lacks_memory
from ollamapy.lifecycle.outbox import Outbox
from ollamapy.lifecycle.wire import commands

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.05  # seconds between two Loading events
Progress = Callable[[str, int, int], None]


class EngineLike(Protocol):
    """What the loop needs of an engine; `ollamapy.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request_id: int, token_ids: list[int], params: protocol.SamplingParams, caller: protocol.Caller) -> None: ...
    def embed(self, request_id: int, token_ids: list[int], caller: protocol.Caller) -> None: ...
    def abort(self, request_id: int) -> None: ...
    def step(self) -> list[Event]: ...
    def stats(self) -> protocol.Stats: ...
    def info(self) -> protocol.EngineInfo: ...


Build = Callable[[Plan, Progress], EngineLike]


class Loop:
    """Serves one daemon connection. `run` returns when the daemon closes it or asks for the end."""

    def __init__(self, sock: socket.socket, plan: Plan, build: Build) -> None:
        self._sock, self._plan, self._build = sock, plan, build
        self._reader = commands()
        self._outbox = Outbox()
        self._last_progress = 0.0

    def run(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the daemon has let go: nobody to serve
            try:
                self._serve(self._load())
            except OllamapyError as error:
                log.error("%s", error)
                self._send([protocol.Fatal(str(error), error.status)])
            except Exception as error:
                text = _out_of_memory(self._plan, error) if lacks_memory(error) else f"the engine failed: {_text(error)}"
                self._send([protocol.Fatal(text)])
                raise  # the process ends: after an error of the device nothing in it can be trusted

    def _load(self) -> EngineLike:
        start = time.monotonic_ns()
        engine = self._build(self._plan, self._progress)
        gc.collect()
        gc.freeze()  # the model never becomes garbage; later collections need not walk it
        info = msgspec.structs.replace(engine.info(), load_ns=time.monotonic_ns() - start)
        self._send([protocol.Ready(info)])
        return engine

    def _progress(self, status: str, completed: int, total: int) -> None:
        now = time.monotonic()
        if completed >= total or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self._send([protocol.Loading(status, completed, total)])

    def _serve(self, engine: EngineLike) -> None:
        while True:
            received = self._receive(wait=not engine.has_work)
            if received is None:
                return
            if received:
                self._send([])  # a prompt may make the next step a long one
            for command in received:
                if isinstance(command, protocol.Shutdown):
                    return
                self._handle(engine, command)
            if engine.has_work:
                events = engine.step()
                self._send(events, may_wait=engine.has_work)

    def _receive(self, wait: bool) -> list[Command] | None:
        """Commands that have come; None at the end of the connection."""
        try:
            data = self._sock.recv(1 << 20, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        return self._reader.feed(data) if data else None

    def _handle(self, engine: EngineLike, command: Command) -> None:
        if isinstance(command, Generate | Embed):
            self._begin(engine, command)
        elif isinstance(command, Abort):
            engine.abort(command.request_id)
        elif isinstance(command, GetStats):
            self._send([engine.stats()])

    def _begin(self, engine: EngineLike, command: Generate | Embed) -> None:
        """A request that the engine refuses fails alone."""
        try:
            if isinstance(command, Generate):
                engine.add(command.request_id, command.token_ids, command.params, command.caller)
            else:
                engine.embed(command.request_id, command.token_ids, command.caller)
        except (OllamapyError, ValueError) as error:
            log.warning("request %d refused: %s", command.request_id, error)
            if isinstance(command, Generate):
                finish = protocol.Finish("error", len(command.token_ids), error=str(error))
                self._send([Step([Output(command.request_id, [], finish=finish)])])
            else:
                self._send([Embedding(command.request_id, b"", len(command.token_ids), str(error))])

    def _send(self, events: list[Event], may_wait: bool = False) -> None:
        if data := self._outbox.put(events, time.monotonic(), last=not may_wait):
            self._sock.sendall(data)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _out_of_memory(plan: Plan, error: BaseException) -> str:
    return (
        f"out of memory on {plan.device} with a context of {plan.context_length} tokens and {plan.num_blocks} KV blocks; "
        f"use a smaller num_ctx, unload other models or use a smaller model ({_text(error)})"
    )
