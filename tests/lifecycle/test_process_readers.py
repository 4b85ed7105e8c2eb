"""Those who read what an engine says: slow ones, ones that leave, ones that do not read at all."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from ollamapy.engine.protocol import Caller, Output, SamplingParams
from ollamapy.errors import EngineError
from ollamapy.lifecycle import process
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import collect
from tests.lifecycle.running import plan, with_spawner, within


def test_a_slow_reader_gets_all_its_tokens_and_does_not_hold_up_others(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", step_seconds=0.001))
        slow = engine.generate([0], SamplingParams(max_tokens=300))
        first = await anext(slow)
        start = time.monotonic()
        assert await collect(engine, 200) == list(range(1, 201))
        assert time.monotonic() - start < 3
        await asyncio.sleep(0.3)
        rest = [output async for output in slow]
        assert len(rest) < 50, "what waited comes as few outputs"
        assert first.token_ids + [t for output in rest for t in output.token_ids] == list(range(1, 301))
        assert rest[-1].finish is not None and rest[-1].finish.completion_tokens == 300
        await engine.close()

    with_spawner(check)


def test_a_reader_too_far_behind_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_BEHIND", 50)

    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", step_seconds=0.001, trace=str(trace)))
        slow = engine.generate([0], SamplingParams(max_tokens=10000))
        await anext(slow)
        await within(5, lambda: "\nabort " in trace.read_text())
        assert engine.num_requests == 0
        assert len((await anext(slow)).token_ids) == 51, "what came before the cut is not lost"
        with pytest.raises(EngineError, match="behind"):
            await anext(slow)
        await engine.close()

    with_spawner(check)


async def _read_until(outputs: AsyncIterator[Output], leave_after: float, how: str) -> float:
    """Reads for a while and leaves; when it left."""

    async def read() -> None:
        async for _ in outputs:
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(leave_after)
    if how == "cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        task.cancel()
        await asyncio.wait([task])
        await outputs.aclose()  # type: ignore[attr-defined]
    return time.time()


def test_fifty_disconnects_abort_at_once(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", trace=str(trace)))
        generator = random.Random(1)
        readers: list[Awaitable[float]] = []
        for i in range(50):
            outputs = engine.generate([0] * (1 + i), SamplingParams(max_tokens=100000))
            readers.append(_read_until(outputs, generator.random() * 0.5, generator.choice(["cancel", "close"])))
        survivor = asyncio.create_task(collect(engine, 60))
        left = sorted(await asyncio.gather(*readers))
        await within(1, lambda: trace.read_text().count("\nabort ") >= 50)
        aborted = sorted(float(line.split()[1]) for line in trace.read_text().splitlines() if line.startswith("abort"))
        assert len(aborted) == 50, "each once"
        assert max(seen - gone for seen, gone in zip(aborted, left, strict=True)) < 0.25
        assert await survivor == list(range(1, 61))
        assert (await engine.stats()).num_running == 0
        assert engine.num_requests == 0
        await engine.close()

    with_spawner(check)


def test_closing_a_finished_generation_aborts_nothing(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", trace=str(trace)))
        outputs = engine.generate([0], SamplingParams(max_tokens=2))
        assert [output.token_ids async for output in outputs] == [[1], [2]]
        await outputs.aclose()  # type: ignore[attr-defined]
        never_started = engine.generate([0], SamplingParams(max_tokens=2))
        await never_started.aclose()  # type: ignore[attr-defined]
        await engine.stats()
        assert "\nabort " not in trace.read_text()
        await engine.close()

    with_spawner(check)


def test_what_cannot_be_sent_leaves_nothing_behind(tmp_path: Path) -> None:
    """Half a surrogate pair is no text that a message can carry."""

    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        with pytest.raises(UnicodeEncodeError):
            await anext(engine.generate([0], SamplingParams(cache_salt="\ud800")))
        with pytest.raises(UnicodeEncodeError):
            await engine.embed([0], Caller("\ud800"))
        assert engine.num_requests == 0
        assert await collect(engine, 3) == [1, 2, 3]
        await engine.close()

    with_spawner(check)
