"""Engines that hang, and those that only seem to."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollamapy.errors import EngineError
from ollamapy.lifecycle import hang, process, spawner
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fake_forkserver import SILENT
from tests.lifecycle.fakes import collect, exists, fake_model, written
from tests.lifecycle.running import hold, loads, plan, with_residents, with_spawner, within


def test_a_stopped_engine_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.4)

    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        await asyncio.sleep(0.7)
        assert engine.alive, "an idle engine is silent and well"
        stream = asyncio.create_task(collect(engine, 100000))
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="did not answer"):
            await asyncio.wait_for(stream, 3)
        asleep = await EngineProcess.start(spawner, plan(tmp_path / "s", hang_at_token=3))
        with pytest.raises(EngineError, match="did not answer"):
            await asyncio.wait_for(collect(asleep, 10), 3)

    with_spawner(check)


def test_an_engine_that_computes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 2.0)  # a busy process waits for a core for less than that, on any machine
    monkeypatch.setattr(hang, "BUSY_AFTER", 2.5)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        start = time.monotonic()
        silence = asyncio.run(asyncio.wait_for(hang.until_hung(busy.pid, lambda: start, lambda: True), 10))
        busy.kill()
    assert silence >= 2.5, "or it was taken for idle"


def test_a_pause_of_the_daemon_itself_is_no_silence_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+Z stops both: what was not seen is not counted."""
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.5)
    start = time.monotonic()

    async def watch(pid: int) -> None:
        asyncio.get_running_loop().call_later(0.2, time.sleep, 0.8)
        await asyncio.wait_for(hang.until_hung(pid, lambda: start, lambda: True), 10)

    with subprocess.Popen(["sleep", "60"]) as asleep:
        asyncio.run(watch(asleep.pid))
        asleep.kill()
    assert time.monotonic() - start >= 0.2 + 0.8 + 0.5


def test_a_busy_engine_that_ignores_shutdown_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CLOSE_GRACE", 0.3)

    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", hang_at_token=2))
        stream = asyncio.create_task(collect(engine, 5))
        await asyncio.sleep(0.2)
        start = time.monotonic()
        await engine.close()
        assert time.monotonic() - start < 1.5
        assert not exists(engine.pid)
        with pytest.raises(EngineError, match="unloaded"):
            await stream

    with_spawner(check)


def test_a_load_without_progress_is_given_up_and_one_with_progress_is_not(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"no progress for 0\.3 s"):
            await EngineProcess.start(spawner, plan(tmp_path / "h", hang_at_load=True, trace=str(trace)), load_timeout=0.3)
        assert time.monotonic() - start < 3
        assert not exists(int(trace.read_text().split()[1]))
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", load_seconds=0.9), load_timeout=0.3)
        await engine.close()

    with_spawner(check)


def test_a_load_that_hangs_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the time that a load without progress may take: asleep for ever, or stopped in the middle."""
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.5)
    traces = [tmp_path / "asleep", tmp_path / "stopped"]
    faults = [{"hang_at_load": True}, {"load_seconds": 60}]

    async def check(spawner: Spawner) -> None:
        started = [
            asyncio.create_task(EngineProcess.start(spawner, plan(tmp_path / f"m{number}", trace=str(trace), **fault)))
            for number, (trace, fault) in enumerate(zip(traces, faults, strict=True))
        ]
        await within(5, lambda: all(map(written, traces)))
        pids = [int(trace.read_text().split()[1]) for trace in traces]
        await asyncio.sleep(0.3)
        os.kill(pids[1], signal.SIGSTOP)
        for result in await asyncio.gather(*started, return_exceptions=True):
            assert isinstance(result, EngineError) and "its process did nothing for" in str(result), result
        assert not any(map(exists, pids))

    with_spawner(check)


def test_a_load_that_takes_long_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it says nothing: as long as it reads, or waits for a disk, a compiler, or a process that compiles for it."""
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 1.5)

    async def check(spawner: Spawner) -> None:
        paths = {name: tmp_path / name for name in SILENT}
        started = []
        for name, path in paths.items():
            started.append(plan(path, silent_load=name, load_seconds=3.5))
        with paths["lock"].open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            loading = [asyncio.create_task(EngineProcess.start(spawner, each)) for each in started]
            await asyncio.sleep(3.5)
            assert not any(each.done() and each.exception() for each in loading)
            assert not loading[list(SILENT).index("lock")].done()
        for engine in await asyncio.gather(*loading):
            assert await collect(engine, 3) == [1, 2, 3]
            await engine.close()

    with_spawner(check)


def test_all_who_wait_for_a_load_that_hangs_are_told_and_the_next_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.5)
    trace = tmp_path / "trace"
    model, other = fake_model(tmp_path, "one", load_seconds=0.5, trace=str(trace)), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        waiting = [asyncio.create_task(hold(residents, model)) for _ in range(3)]
        behind = asyncio.create_task(hold(residents, other))
        await within(5, lambda: written(trace))
        pid = int(trace.read_text().split()[1])
        os.kill(pid, signal.SIGSTOP)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, EngineError) and "did nothing for" in str(result), result
        assert await behind, "loads go one after the other"
        assert await hold(residents, model) != pid
        assert len(loads(trace)) == 2

    with_residents(check)


def test_requests_of_an_engine_that_does_not_die_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in which a device's driver hangs: SIGKILL waits for the kernel."""
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.4)
    monkeypatch.setattr(spawner.Engine, "kill", lambda self: None)

    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        stream = asyncio.create_task(collect(engine, 100000))
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineError, match="did not answer"):
                await asyncio.wait_for(stream, 5)
            assert not engine.alive and exists(engine.pid)
        finally:
            os.kill(engine.pid, signal.SIGKILL)

    with_spawner(check)
