"""Runs a test against engine processes, or against `Residents` of them, and sees to it that nothing is left afterwards."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ollamapy.engine.protocol import Plan
from ollamapy.env import Settings
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, FakeModel, exists, open_fds, write_faults

GIB = 1 << 30
MACHINE = Devices(cpu_cores=2, total_memory=8 * GIB, free_memory=8 * GIB)
T = TypeVar("T")
Test = Callable[[T], Coroutine[Any, Any, None]]


def with_spawner(test: Test[Spawner]) -> None:
    """Runs `test` with a spawner of fakes; afterwards no process and no file descriptor may be left."""

    async def main() -> None:
        spawner = Spawner(COMMAND)
        spawner.start()
        pid = spawner.pid
        try:
            await asyncio.wait_for(test(spawner), 20)
        finally:
            spawner.close()
            assert pid is not None and not exists(pid)

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def with_residents(
    test: Test[Residents],
    discover: Callable[[], Devices] = lambda: MACHINE,
    command: tuple[str, ...] = COMMAND,
    seconds: float = 20,
    **settings: Any,
) -> None:
    """Runs `test` with Residents of fakes; afterwards no process, task or file descriptor may be left."""

    async def main() -> None:
        residents = Residents(Settings(**settings), discover=discover, spawner=Spawner(command))
        residents.start()
        pid = residents._spawner.pid
        try:
            await asyncio.wait_for(test(residents), seconds)
        finally:
            await residents.close()
        assert pid is not None and not exists(pid)
        assert not residents._residents and not residents._loads and not len(residents._limits)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


async def within(seconds: float, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.005)


def plan(path: Path, **faults: Any) -> Plan:
    return Plan(str(write_faults(path, **faults)))


def loads(trace: Path) -> list[dict[str, Any]]:
    """The plans of the loads that engines began, in order."""
    if not trace.exists():
        return []
    return [json.loads(line.split(" ", 2)[2]) for line in trace.read_text().splitlines() if line.startswith("load")]


def names(residents: Residents) -> set[str]:
    return {row.name.model for row in residents.running()}


async def hold(
    residents: Residents, model: FakeModel, seconds: float = 0.0, options: Mapping[str, object] | None = None,
    keep_alive: float | None = None,
) -> int:  # fmt: skip
    """Uses the model for a while and returns its engine's pid."""
    async with residents.use(model, options or {}, keep_alive) as loaded:
        await asyncio.sleep(seconds)
        return loaded.engine.pid
