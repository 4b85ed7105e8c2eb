"""The child processes in which grammars are tried, and whose turn it is. Knows no format of a request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from ollamapy.env import child_environment
from ollamapy.errors import ServerBusy

CHILDREN = 2
SECONDS = 2.0  # to try one grammar
PATIENCE = 10.0  # seconds until it is a request's turn
_ROOT = str(Path(__file__).parents[2])
_START = f"import sys; sys.path.append({_ROOT!r}); from ollamapy.server.grammar_check import main; main()"
COMMAND = (sys.executable, "-P", "-c", _START)


class Failed(Exception):
    """A grammar that takes too long to try, or ends the process that does."""


class Checkers:
    """At most CHILDREN at work, at most one of them for each client: one with many hard grammars leaves others room."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(CHILDREN)
        self._own: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._idle: list[asyncio.subprocess.Process] = []
        self._busy: set[asyncio.subprocess.Process] = set()

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """While it is held, `ask` has a child. Raises ServerBusy when there is none within PATIENCE."""
        own = self._own.setdefault(client, asyncio.Lock())
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(PATIENCE):
                    await held.enter_async_context(own)
                    await held.enter_async_context(self._room)
            except TimeoutError:
                text = "server busy, please try again.  other formats are being checked"
                raise ServerBusy(text, math.ceil(PATIENCE)) from None
            yield

    async def ask(self, grammar: bytes) -> str:
        """What is wrong with a grammar, one line of JSON; "" when nothing is. Raises Failed."""
        child = self._idle.pop() if self._idle else None
        try:
            if child is None or child.returncode is not None:
                child = await self._start()
            self._busy.add(child)
            assert child.stdin is not None and child.stdout is not None
            async with asyncio.timeout(SECONDS):
                child.stdin.write(grammar + b"\n")
                await child.stdin.drain()
                answer = str(msgspec.json.decode(await child.stdout.readline()))
        except TimeoutError:
            raise Failed(f"it takes more than {SECONDS:g} s to compile") from None
        except (OSError, RuntimeError, msgspec.DecodeError):  # the child has ended: its memory, or a fault in llguidance
            raise Failed("it cannot be compiled") from None
        else:
            self._busy.discard(child)
            self._idle.append(child)
            return answer
        finally:  # also when the client has left: the child would answer the next question with this one's answer
            if child is not None and child in self._busy:
                await self._end(child)

    async def close(self) -> None:
        for child in [*self._idle, *self._busy]:
            await self._end(child)

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        self._busy.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        environment = child_environment(OPENBLAS_NUM_THREADS="1", RAYON_NUM_THREADS="1")
        child = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=pipe,
            stdout=pipe,
            env=environment,
            start_new_session=True,  # Ctrl-C is the daemon's; the child ends with its stdin
        )
        self._busy.add(child)  # before anything is awaited: a client that leaves now must not leave a process behind
        assert child.stdout is not None
        try:
            await child.stdout.readline()  # it has imported what it needs: the time that counts begins now
        except asyncio.CancelledError:
            await self._end(child)
            raise
        return child
