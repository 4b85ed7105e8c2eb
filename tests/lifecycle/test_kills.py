"""Kills at random moments, many times: what one test of each kind does not meet by chance."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ollamapy.env import Settings
from ollamapy.errors import EngineError
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.process import DIED
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import COMMAND as REAL
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, FakeModel, collect, descendants, exists, fake_model, wait_until, write_faults
from tests.lifecycle.running import with_residents, within
from tests.lifecycle.test_process_faults import DAEMON
from tests.lifecycle.test_random_faults import WHOLE, answer, beside, outcome, real_model, told

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


def pids(residents: Residents) -> set[int]:
    """Of the engines that it takes for loaded: it hears of a death a moment after it."""
    return {resident.engine.pid for resident in residents._residents.values()}


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
            assert time.monotonic() - killed < 1.0
        await one(residents, model)
        await residents.close()

    asyncio.run(main())
    assert outcomes.count("EngineError") > 100 and outcomes.count("NoneType") > 20, outcomes


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_real_engines_are_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """As above, with torch in the engines, beside one that is not killed. Of 200 the times are judged, too."""
    model, other = real_model(tmp_path, "killed"), real_model(tmp_path, "other")
    generator, outcomes, number = random.Random(5), Counter[str](), 0
    ends, restarts, first = [], [], 0.0

    async def check(residents: Residents) -> None:
        nonlocal number, first
        whole = await answer(residents, model, 600)  # waits for torch, too
        await residents.unload(model)
        start = time.monotonic()
        await answer(residents, model, 5)
        first = time.monotonic() - start
        await residents.unload(model)
        async with beside(residents, other) as pid:
            while number < kills:
                lengths = [(generator.randrange(1, 600), generator.choice([3, 1000])) for _ in range(4)]
                tasks = [asyncio.create_task(outcome(residents, model, n, whole, prompt)) for n, prompt in lengths]
                await asyncio.sleep(generator.random() * 0.6)
                engines = descendants(residents._spawner.pid or 0) - {pid}
                for each in engines:
                    os.kill(each, signal.SIGKILL)
                number, killed = number + len(engines), time.monotonic()
                outcomes.update(await asyncio.wait_for(asyncio.gather(*tasks), 20))
                ended = time.monotonic()
                await within(2, lambda: not pids(residents) & engines)  # noqa: B023
                assert await outcome(residents, model, 5, whole) == WHOLE, "of the engine after it"
                if engines:
                    ends.append(ended - killed)
                    restarts.append(time.monotonic() - ended)
                if generator.random() < 0.5:
                    await residents.unload(model)

    with_residents(check, Devices.discover, REAL, seconds=580)
    print(outcomes, f"a load and an answer: {first:.3f} s")
    for name, each in (("all were told", ends), ("the next answer", restarts)):
        print(f"until {name}: median {sorted(each)[len(each) // 2]:.3f} s, most {max(each):.3f} s")
    assert told(outcomes, DIED) >= kills // 2 and outcomes[WHOLE] > 0
    if kills == 200:
        assert max(ends) <= 1.0 and max(restarts) <= first + 2.0
