"""The daemon's side of one engine process: start, generate, embed, stats, close, and its death. Knows no names or text."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

import msgspec
import psutil

from ollamapy.engine import protocol
from ollamapy.engine.protocol import (
    NOBODY,
    Caller,
    Embedding,
    EngineInfo,
    Event,
    Loading,
    Output,
    Plan,
    Ready,
    SamplingParams,
    Stats,
)
from ollamapy.errors import BadRequest, EngineError, NotFound, NotSupported, OllamapyError
from ollamapy.lifecycle import hang, spawner
from ollamapy.lifecycle.inbox import Inbox
from ollamapy.lifecycle.wire import encode, events

log = logging.getLogger(__name__)

DIED = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"
MAX_BEHIND = 1 << 17  # tokens and logprob entries (5 MB, with logprobs 15) that a reader may be behind its generation
LOAD_TIMED_OUT = "timed out waiting for the model to load"
CLOSE_GRACE = 2.0  # seconds from Shutdown to SIGKILL
T = TypeVar("T")
_STATUS: dict[int, type[OllamapyError]] = {400: BadRequest, 404: NotFound, 501: NotSupported}


class EngineProcess(asyncio.Protocol):
    """A started engine. Made by `start`; every wait on it ends with EngineError when its process ends."""

    info: EngineInfo

    def __init__(self, plan: Plan, process: spawner.Engine, on_progress: Callable[[Loading], None] | None) -> None:
        self.plan, self.pid = plan, process.pid
        self.died = asyncio.Event()
        self.on_death: Callable[[], None] = lambda: None  # called when it ends without being closed
        self.closing = False
        self._process, self._on_progress = process, on_progress
        self._ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._frames = events()
        self._ids = itertools.count(1)
        self._requests: dict[int, Inbox] = {}
        self._embeds: dict[int, asyncio.Future[Embedding]] = {}
        self._stats: deque[asyncio.Future[Stats]] = deque()
        self._failure: tuple[type[OllamapyError], str] | None = None
        self._last_event = time.monotonic()
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        source: spawner.Spawner,
        plan: Plan,
        on_progress: Callable[[Loading], None] | None = None,
        load_timeout: float = math.inf,
    ) -> EngineProcess:
        """Forks an engine and waits until it is ready. `load_timeout`: seconds without progress; <= 0 is no limit. A process
        that does nothing at all is not waited for so long (`hang`).

        Raises EngineError, or the error that the engine reports. Cancelling it leaves no process behind.
        """
        sock, process = await source.spawn(plan)
        engine = cls(plan, process, on_progress)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: engine, sock=sock)
            engine.info = await engine._loaded(load_timeout if load_timeout > 0 else math.inf)
            engine._check()  # it may have died a moment after it was ready
        except BaseException:
            engine.closing = True
            engine._ready.cancel()
            engine.kill()
            sock.close() if engine._transport is None else engine._transport.abort()
            await process.exit_code(CLOSE_GRACE)  # its memory is free when the next load is planned
            raise
        engine._watch = asyncio.create_task(engine._end_when_hung())
        return engine

    async def _loaded(self, timeout: float) -> EngineInfo:
        hung = asyncio.create_task(hang.until_hung(self.pid, lambda: self._last_event, lambda: True, loading=True))
        ends: list[asyncio.Future[Any]] = [self._ready, hung]
        try:
            while True:
                left = self._last_event + timeout - time.monotonic()
                wait = None if left == math.inf else max(0.0, left)
                await asyncio.wait(ends, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if self._ready.done():
                    return self._ready.result()
                if hung.done():
                    raise EngineError(f"{LOAD_TIMED_OUT}: its process did nothing for {hung.result():.0f} s and was ended")
                if time.monotonic() - self._last_event >= timeout:
                    raise EngineError(f"{LOAD_TIMED_OUT}: no progress for {timeout:g} s")
        finally:
            hung.cancel()

    @property
    def alive(self) -> bool:
        return not self.died.is_set()

    @property
    def num_requests(self) -> int:
        return len(self._requests) + len(self._embeds)

    @property
    def num_waiting(self) -> int:
        """Generations of which nothing has come yet, and embeddings."""
        return sum(request.waits for request in self._requests.values()) + len(self._embeds)

    async def generate(self, token_ids: list[int], params: SamplingParams, caller: Caller = NOBODY) -> AsyncIterator[Output]:
        """Outputs as they come, the last with `finish`; a reader that is behind gets several as one.

        Closing the iterator, or cancelling the task that reads it, aborts the request at once. Raises EngineError and,
        for a grammar that grows too large, BadRequest.
        """
        self._check()
        request_id = next(self._ids)
        request = self._requests[request_id] = Inbox()
        finished = False
        try:
            self._send(protocol.Generate(request_id, token_ids, params, caller))
            while not finished:
                output = await request.take()
                finished = output.finish is not None
                if output.finish is not None and output.finish.reason == "error":
                    raise (BadRequest if output.finish.bad_request else EngineError)(output.finish.error)
                yield output
        finally:
            if self._requests.pop(request_id, None) is not None and not finished:
                self._abort(request_id)

    async def embed(self, token_ids: list[int], caller: Caller = NOBODY) -> Embedding:
        """The pooled hidden state: `.vector` is little-endian float32, not normalised. Cancelling it aborts."""
        self._check()
        request_id = next(self._ids)
        future: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()
        self._embeds[request_id] = future
        try:
            self._send(protocol.Embed(request_id, token_ids, caller))
            embedding = await future
        except asyncio.CancelledError:
            self._abort(request_id)
            raise
        finally:
            self._embeds.pop(request_id, None)
        if embedding.error:
            raise EngineError(embedding.error)
        return embedding

    async def stats(self) -> Stats:
        """The engine's counters, between two of its steps."""
        self._check()
        future: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._stats.append(future)
        self._send(protocol.GetStats())
        return await future

    async def close(self) -> None:
        """Ends the process: politely, then by SIGKILL. Requests in flight end with EngineError. Returns when it is gone."""
        self.closing = True
        if self.alive:
            self._send(protocol.Shutdown())
        if await self._process.exit_code(CLOSE_GRACE) is None:
            self.kill()
            if await self._process.exit_code(CLOSE_GRACE) is None:
                log.error("engine process %d does not end (uninterruptible in the kernel?)", self.pid)
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        """SIGKILL now; `died` follows."""
        self._process.kill()

    def memory(self) -> int:
        """Resident bytes of the process, 0 when it is gone. Pages shared with the forkserver are counted."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._last_event = time.monotonic()
        try:
            received = self._frames.feed(data)
        except (ValueError, msgspec.DecodeError) as error:
            self._failure = EngineError, f"the engine process sent what cannot be read: {error}"
            self.kill()
            return
        for event in received:
            self._take(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended or is about to: the kernel closes its sockets first."""
        if self._watch is not None:
            self._watch.cancel()
        self.kill()
        self.died.set()
        if not self.closing:
            log.error(
                "engine process %d has ended with %d requests in flight: %s", self.pid, self.num_requests, self.end_reason()
            )
        for request in self._requests.values():
            request.fail(self.end_reason())
        waiting: list[asyncio.Future[Any]] = [*self._embeds.values(), *self._stats]
        for future in waiting if self._ready.done() else [*waiting, self._ready]:
            if not future.done():
                future.set_exception(self.end_reason())
        if not self.closing:
            self.on_death()

    def _take(self, event: Event) -> None:
        if isinstance(event, protocol.Step):
            for output in event.outputs:
                self._take_output(output)
        elif isinstance(event, Embedding):
            self._resolve(self._embeds.get(event.request_id), event)
        elif isinstance(event, Stats):
            self._resolve(self._stats.popleft() if self._stats else None, event)
        elif isinstance(event, Loading):
            if self._on_progress is not None:
                self._on_progress(event)
        elif isinstance(event, Ready):
            self._resolve(self._ready, event.info)
        else:
            self._failure = _STATUS.get(event.status, EngineError), event.error

    def _take_output(self, output: Output) -> None:
        request = self._requests.get(output.request_id)
        if request is None:  # aborted a moment ago
            return
        request.put(output)
        if request.behind > MAX_BEHIND and output.finish is None:
            del self._requests[output.request_id]
            self._abort(output.request_id)
            request.fail(EngineError(f"generation stopped: the client is more than {MAX_BEHIND} tokens behind"))

    @staticmethod
    def _resolve(future: asyncio.Future[T] | None, value: T) -> None:
        if future is not None and not future.done():
            future.set_result(value)

    def _send(self, command: protocol.Command) -> None:
        assert self._transport is not None
        self._transport.write(encode(command))

    def _abort(self, request_id: int) -> None:
        if self.alive:
            self._send(protocol.Abort(request_id))

    def _check(self) -> None:
        if not self.alive:
            raise self.end_reason()

    def end_reason(self) -> OllamapyError:
        """What its requests are told when it has ended."""
        if self._failure is not None:
            kind, text = self._failure
            return kind(text)
        return EngineError("the model was unloaded" if self.closing else f"{DIED}, check ollamapy server logs for details")

    async def _end_when_hung(self) -> None:
        silence = await hang.until_hung(self.pid, lambda: self._last_event, lambda: self.num_requests > 0)
        self._failure = EngineError, f"{DIED}: it did not answer for {silence:.0f} s and was ended"
        self.kill()
        assert self._transport is not None
        self._transport.abort()  # its requests are told at once: a driver that hangs in the kernel may keep it alive
