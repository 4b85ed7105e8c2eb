"""Engines that hang, and those that only seem to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollamapy.errors import EngineError
from ollamapy.lifecycle import hang, process
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import collect, exists
from tests.lifecycle.running import plan, with_spawner


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
