"""Several answers to one request, side by side: for `n` choices, and for several prompts. Knows no API's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from ollamapy.errors import BadRequest

MAX_N = 128  # as OpenAI's: samples to vote among, or to evaluate by, are asked for by the hundred
MAX_CHOICES = 2048  # prompts times n, which bounds the work of a request; of it, only TOGETHER answers are in the engine
TOGETHER = 32  # answers under way at a time
BEHIND = 64  # lines that may wait for the reader
GAMMA = 0x9E3779B97F4A7C15
Line = TypeVar("Line")
T = TypeVar("T")


def check_choices(num_prompts: int, n: int) -> None:
    """Raises BadRequest."""
    if not 1 <= n <= MAX_N:
        raise BadRequest(f"n must be between 1 and {MAX_N}")
    if num_prompts * n > MAX_CHOICES:
        raise BadRequest(f"{num_prompts} prompts with n = {n} are more than {MAX_CHOICES} choices")


class Once(Generic[T]):
    """What the choices of one prompt share, made by the first that needs it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, T] = {}
        self._one = asyncio.Lock()

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What was made for an equal `key`, else what `make` makes now."""
        async with self._one:
            if key not in self._made:
                self._made[key] = await make()
            return self._made[key]


def seed_of(seed: int, choice: int) -> int:
    """Seed of choice 0, 1, ... of a request with a seed, the first its own; -1 stays a random one for each."""
    return seed if seed < 0 else (seed + choice * GAMMA) & (2**63 - 1)


async def side_by_side(start: Sequence[Callable[[], AsyncGenerator[Line]]]) -> AsyncGenerator[tuple[int, Line]]:
    """Lines of all answers as they come, with their index. Those that have one prompt share it in the engine.

    An error of one ends all; closing the iterator closes all.
    """
    lines: asyncio.Queue[tuple[int, Line] | BaseException | None] = asyncio.Queue(BEHIND)
    room = asyncio.Semaphore(TOGETHER)

    async def read(index: int) -> None:
        try:
            async with room, aclosing(start[index]()) as answer:
                async for line in answer:
                    await lines.put((index, line))
            await lines.put(None)
        except Exception as error:
            await lines.put(error)

    tasks = [asyncio.create_task(read(index)) for index in range(len(start))]
    try:
        left = len(tasks)
        while left:
            line = await lines.get()
            if isinstance(line, BaseException):
                raise line
            if line is None:
                left -= 1
            else:
                yield line
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
