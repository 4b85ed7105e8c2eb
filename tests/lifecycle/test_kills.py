"""Kills at random moments, many times: what one test of each kind does not meet by chance."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollamapy.env import Settings
from ollamapy.errors import EngineError
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, FakeModel, collect, descendants, exists, fake_model, wait_until, write_faults
from tests.lifecycle.test_process_faults import DAEMON

ROOT = Path(__file__).parents[2]
MACHINE = Devices(cpu_cores=2, total_memory=8 << 30, free_memory=8 << 30)


@pytest.mark.slow
def test_the_daemon_is_killed_at_random_moments(tmp_path: Path) -> None:
    paths = [write_faults(tmp_path / "a"), write_faults(tmp_path / "b", hang_at_token=5)]
    paths.append(write_faults(tmp_path / "c", hang_at_load=True))
    generator = random.Random(3)
    most = 0
    for _ in range(100):
        with subprocess.Popen([sys.executable, "-c", DAEMON, *map(str, paths)], stdout=subprocess.DEVNULL, cwd=ROOT) as daemon:
            time.sleep(generator.random() * 0.8)
            os.kill(daemon.pid, signal.SIGSTOP)  # so that the list is complete
            pids = descendants(daemon.pid)
            most = max(most, len(pids))
            daemon.kill()
            wait_until(lambda pids=pids: not any(exists(pid) for pid in pids), 1.0)  # type: ignore[misc]
    assert most == 4, "some came late enough to meet a forkserver and three engines"


@pytest.mark.slow
def test_engines_are_killed_at_random_moments(tmp_path: Path) -> None:
    """Loading, starting a stream, in the middle of it, idle: each request ends at once with an answer or an error."""
    model = fake_model(tmp_path, "one", load_seconds=0.05, step_seconds=0.002)
    generator = random.Random(5)
    outcomes: list[str] = []

    async def one(residents: Residents, model: FakeModel) -> None:
        async with residents.use(model, {}, generator.choice([None, 0, 0.05])) as loaded:
            assert await collect(loaded.engine, 40) == list(range(1, 41))

    async def main() -> None:
        residents = Residents(Settings(), discover=lambda: MACHINE, spawner=Spawner(COMMAND))
        residents._breaker.record = lambda key, reason: None  # type: ignore[method-assign]
        residents.start()
        await residents._spawner.ready()
        assert residents._spawner.pid is not None
        for _ in range(200):
            streams = [asyncio.create_task(one(residents, model)) for _ in range(4)]
            await asyncio.sleep(generator.random() * 0.25)
            for pid in descendants(residents._spawner.pid):
                os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 5)
            outcomes.extend(type(result).__name__ for result in results)
            assert all(result is None or isinstance(result, EngineError) for result in results), results
            assert time.monotonic() - killed < 1.5
        await one(residents, model)
        await residents.close()

    asyncio.run(main())
    assert outcomes.count("EngineError") > 100 and outcomes.count("NoneType") > 20, outcomes
