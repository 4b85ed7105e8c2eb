"""Engines, forkservers and daemons that die or talk nonsense: whoever waits is told, and the next one works."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ollamapy.errors import BadRequest, EngineError
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fake_forkserver import GARBAGE
from tests.lifecycle.fakes import collect, exists, wait_until, write_faults, written
from tests.lifecycle.running import plan, with_spawner, within


def test_kill_9_of_the_engine_ends_eight_streams_and_a_new_engine_works(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        killed_at = 0.0
        ended: list[float] = []

        async def stream() -> None:
            with pytest.raises(EngineError, match="model runner has unexpectedly stopped"):
                await collect(engine, 100000)
            ended.append(time.monotonic())

        async def embed() -> None:
            with pytest.raises(EngineError, match="unexpectedly stopped"):
                await engine.embed([1] * 5)

        streams = [asyncio.create_task(stream()) for _ in range(8)]
        await asyncio.sleep(0.2)
        os.kill(engine.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        late = asyncio.create_task(embed())
        await asyncio.gather(*streams, late)
        assert max(ended) - killed_at < 1.0
        assert not engine.alive
        again = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        assert await collect(again, 3) == [1, 2, 3]
        await again.close()

    with_spawner(check)


def test_an_error_in_a_step_reaches_its_requests_and_ends_the_process(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", raise_at_token=3))
        for result in await asyncio.gather(collect(engine, 9), collect(engine, 9), return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "device-side assert" in str(result)
        await asyncio.wait_for(engine.died.wait(), 1)
        await within(1, lambda: not exists(engine.pid))

    with_spawner(check)


def test_out_of_memory_in_a_step_says_so_and_the_next_engine_works(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", memory_error_at_token=3))
        for result in await asyncio.gather(*(collect(engine, 9) for _ in range(3)), return_exceptions=True):
            assert isinstance(result, EngineError) and "out of memory on cpu" in str(result)
        await within(1, lambda: not exists(engine.pid))
        again = await EngineProcess.start(spawner, plan(tmp_path / "n"))
        assert await collect(again, 3) == [1, 2, 3]
        await again.close()

    with_spawner(check)


@pytest.mark.parametrize("garbage", [name for name in GARBAGE if name != "a message for nobody"])
def test_what_is_no_event_ends_the_engine_and_all_its_requests_are_told(tmp_path: Path, garbage: str) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", garbage=garbage))
        other = await EngineProcess.start(spawner, plan(tmp_path / "n"))
        unaffected = asyncio.create_task(collect(other, 20))
        for result in await asyncio.gather(*(collect(engine, 9) for _ in range(3)), return_exceptions=True):
            assert isinstance(result, EngineError) and "cannot be read" in str(result)
        await within(1, lambda: not exists(engine.pid))
        assert await unaffected == list(range(1, 21))
        await other.close()

    with_spawner(check)


def test_events_that_nobody_waits_for_are_passed_over(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", garbage="a message for nobody"))
        assert await collect(engine, 9) == list(range(1, 10))
        assert (await engine.stats()).num_steps >= 9
        await engine.close()

    with_spawner(check)


def test_what_is_no_command_ends_the_engine(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        stream = asyncio.create_task(collect(engine, 100000))
        await asyncio.sleep(0.05)
        assert engine._transport is not None
        engine._transport.write(GARBAGE["no msgpack"])
        with pytest.raises(EngineError, match="the engine failed: DecodeError"):
            await asyncio.wait_for(stream, 2)
        await within(1, lambda: not exists(engine.pid))

    with_spawner(check)


@pytest.mark.parametrize(
    ("faults", "kind", "text"),
    [
        ({"raise_at_load": "architecture 'x' is not supported"}, BadRequest, "architecture 'x'"),
        ({"memory_error_at_load": True}, EngineError, "out of memory on cpu.*smaller num_ctx"),
        ({"die_at_load": True}, EngineError, "unexpectedly stopped"),
    ],
)
def test_failures_at_load(tmp_path: Path, faults: dict[str, Any], kind: type[Exception], text: str) -> None:
    async def check(spawner: Spawner) -> None:
        with pytest.raises(kind, match=text):
            await EngineProcess.start(spawner, plan(tmp_path / "m", **faults))

    with_spawner(check)


def test_death_of_the_forkserver_ends_its_engines_and_the_next_start_brings_another(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        stream = asyncio.create_task(collect(engine, 100000))
        await asyncio.sleep(0.05)
        first = spawner.pid
        os.kill(first or 0, signal.SIGKILL)
        with pytest.raises(EngineError, match="unexpectedly stopped"):
            await asyncio.wait_for(stream, 1)
        again = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        assert spawner.pid != first
        assert await collect(again, 2) == [1, 2]
        await engine.close()
        await again.close()

    with_spawner(check)


DAEMON = """
import asyncio, sys
from pathlib import Path
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from ollamapy.engine.protocol import Plan
from tests.lifecycle.fake_forkserver import GARBAGE
from tests.lifecycle.fakes import COMMAND, collect, written
async def main():
    spawner = Spawner(COMMAND)
    engines = [await EngineProcess.start(spawner, Plan(path)) for path in sys.argv[1:3]]
    streams = [asyncio.create_task(collect(engine, 100000)) for engine in engines]
    asyncio.create_task(EngineProcess.start(spawner, Plan(sys.argv[3])))
    await asyncio.sleep(0.2)
    print(spawner.pid, *(engine.pid for engine in engines), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_kill_9_of_the_daemon_leaves_no_process(tmp_path: Path) -> None:
    """Two engines stream and a third hangs in its load."""
    trace = tmp_path / "trace"
    paths = [write_faults(tmp_path / "a"), write_faults(tmp_path / "b", hang_at_token=5)]
    paths.append(write_faults(tmp_path / "c", hang_at_load=True, trace=str(trace)))
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", DAEMON, *map(str, paths)], stdout=subprocess.PIPE, cwd=root) as daemon:
        assert daemon.stdout is not None
        pids = [int(pid) for pid in daemon.stdout.readline().split()]
        wait_until(lambda: written(trace), 2)
        pids.append(int(trace.read_text().split()[1]))
        assert len(pids) == 4 and all(exists(pid) for pid in pids)
        daemon.kill()
        wait_until(lambda: not any(exists(pid) for pid in pids), 1.0)
