"""Loads that fail or are given up, engines that die, models that are stopped: nothing is stuck, nothing stays."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ollamapy.engine.protocol import SamplingParams
from ollamapy.env import Settings
from ollamapy.errors import EngineError, NotFound, OllamapyError, ServerBusy, TokenizerError, UnsupportedModel
from ollamapy.lifecycle import process
from ollamapy.lifecycle import residents as residents_module
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, FakeModel, collect, exists, fake_model, write_model, written
from tests.lifecycle.running import MACHINE, hold, loads, names, with_residents, within


def test_a_crash_ends_streams_and_the_next_use_loads_again(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def stream(residents: Residents) -> None:
        async with residents.use(model, {}) as loaded:
            await collect(loaded.engine, 100000)

    async def check(residents: Residents) -> None:
        streams = [asyncio.create_task(stream(residents)) for _ in range(8)]
        await within(2, lambda: bool(residents.running()))
        pid = residents.running()[0].info and next(iter(residents._residents.values())).engine.pid
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, EngineError) and "unexpectedly stopped" in str(result)
        assert time.monotonic() - start < 1
        assert not residents.running()
        assert await hold(residents, model) != pid

    with_residents(check)


def test_three_crashes_open_the_breaker_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    trace = tmp_path / "trace"
    model, other = fake_model(tmp_path, "one", die_at_load_until=str(broken), trace=str(trace)), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        for _ in range(3):
            with pytest.raises(EngineError, match=r"^model runner has unexpectedly stopped"):
                await hold(residents, model)
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(EngineError, match=r"3 times within 60 s.*not started again.*unexpectedly stopped"):
                await hold(residents, model)
        assert time.monotonic() - start < 0.1
        assert len(loads(trace)) == 3
        await hold(residents, other)
        broken.unlink()
        residents._breaker._clock = lambda: time.monotonic() + 31
        await hold(residents, model)

    with_residents(check)


def test_errors_of_a_load_reach_all_waiters(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", raise_at_load="tensor x is missing", load_seconds=0.1)
    no_tokenizer = FakeModel(model.name, "", write_model(tmp_path / "t.gguf"))
    assert no_tokenizer.model_path is not None
    raw = no_tokenizer.model_path.read_bytes()
    no_tokenizer.model_path.write_bytes(raw.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.nodel"))
    no_support = FakeModel(model.name, "", tmp_path / "u.gguf")
    (tmp_path / "u.gguf").write_bytes(
        raw.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama\x13", b"\x05\x00\x00\x00\x00\x00\x00\x00xlama\x13")
    )

    async def check(residents: Residents) -> None:
        for result in await asyncio.gather(*(hold(residents, model) for _ in range(3)), return_exceptions=True):
            assert isinstance(result, OllamapyError) and result.status == 400 and "tensor x" in str(result)
        with pytest.raises(TokenizerError):
            await hold(residents, no_tokenizer)
        with pytest.raises(UnsupportedModel, match="xlama"):
            await hold(residents, no_support)
        for path in (tmp_path / "gone.gguf", None):
            with pytest.raises(NotFound, match=r'^model "one:latest" not found, try pulling it first$'):
                await hold(residents, FakeModel(model.name, "", path))
        assert not residents.running()

    with_residents(check)


def test_cancelling_the_only_waiter_ends_the_load(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    slow, next_one = fake_model(tmp_path, "slow", hang_at_load=True, trace=str(trace)), fake_model(tmp_path, "next")

    async def check(residents: Residents) -> None:
        waiters = [asyncio.create_task(hold(residents, slow)) for _ in range(2)]
        queued = asyncio.create_task(hold(residents, next_one))
        given_up = asyncio.create_task(hold(residents, fake_model(tmp_path, "third")))
        await within(2, lambda: written(trace))
        pid = int(trace.read_text().split()[1])
        given_up.cancel()
        waiters[0].cancel()
        await asyncio.sleep(0.1)
        assert exists(pid), "the other one still waits"
        assert not queued.done()
        waiters[1].cancel()
        await within(1, lambda: not exists(pid))
        await queued
        assert names(residents) == {"next"}
        assert not residents._loads and not len(residents._limits)

    with_residents(check)


def test_a_new_request_right_after_a_load_was_given_up(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.2)

    async def check(residents: Residents) -> None:
        first = asyncio.create_task(hold(residents, model))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0)
        assert await hold(residents, model)
        assert len(residents.running()) == 1

    with_residents(check)


def test_leaving_at_the_very_moment_the_load_is_done(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.1)

    async def check(residents: Residents) -> None:
        leaving = asyncio.create_task(hold(residents, model))
        await asyncio.sleep(0.05)
        (load,) = residents._loads.values()
        load.task.add_done_callback(lambda _: leaving.cancel())
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        (row,) = residents.running()
        assert row.num_requests == 0, "it is idle, and goes when its time is up"

    with_residents(check)


def test_a_load_waits_for_what_is_still_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CLOSE_GRACE", 1.0)
    stuck, other = fake_model(tmp_path, "stuck", hang_at_token=2), fake_model(tmp_path, "other")

    async def check(residents: Residents) -> None:
        async with residents.use(stuck, {}, 0) as loaded:
            outputs = loaded.engine.generate([0], SamplingParams())
            await anext(outputs)
            pid = loaded.engine.pid
        assert not residents.running()
        assert exists(pid), "its engine does not listen; it has until the end of its grace"
        await hold(residents, other)
        assert not exists(pid), "or the memory of both would be taken"

    with_residents(check)


def test_unload_ends_an_idle_model_and_drains_a_busy_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents_module, "DRAIN", 0.3)
    model = fake_model(tmp_path, "one")

    async def stream(residents: Residents) -> None:
        async with residents.use(model, {}, -1) as loaded:
            await collect(loaded.engine, 100000)

    async def check(residents: Residents) -> None:
        assert not await residents.unload(model)
        pid = await hold(residents, model, keep_alive=-1)
        assert await residents.unload(model)
        assert not exists(pid) and not residents.running()
        short = asyncio.create_task(hold(residents, model, 0.2))
        await within(2, lambda: bool(residents.running()))
        await residents.unload(model)
        assert short.done() and not residents.running()
        endless = asyncio.create_task(stream(residents))
        await within(2, lambda: bool(residents.running()))
        start = time.monotonic()
        unloading = asyncio.create_task(residents.unload(model))
        await asyncio.sleep(0.05)
        unloading.cancel()
        late = await hold(residents, model)
        assert 0.2 < time.monotonic() - start < 2
        with pytest.raises(EngineError, match="unloaded"):
            await endless
        assert exists(late)

    with_residents(check)


def test_close_drains_then_kills_and_refuses_what_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents_module, "DRAIN", 0.4)
    model, other = fake_model(tmp_path, "one"), fake_model(tmp_path, "two", hang_at_load=True)

    async def stream(residents: Residents, tokens: int) -> list[int]:
        async with residents.use(model, {}) as loaded:
            return await collect(loaded.engine, tokens)

    async def main() -> None:
        residents = Residents(Settings(), discover=lambda: MACHINE, spawner=Spawner(COMMAND))
        short = asyncio.create_task(stream(residents, 20))
        endless = asyncio.create_task(stream(residents, 100000))
        await within(2, lambda: bool(residents.running()))
        loading = asyncio.create_task(hold(residents, other))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(residents.close())
        await asyncio.sleep(0)
        for attempt in (model, other):
            with pytest.raises(ServerBusy, match="shutting down"):
                await hold(residents, attempt)
        with pytest.raises(ServerBusy, match="shutting down"):
            await loading
        assert await short == list(range(1, 21))
        with pytest.raises(EngineError, match="unloaded"):
            await endless
        await closing

    asyncio.run(main())


def test_churn_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tasks load, stream, leave, unload, kill and resize four models; everything comes back, and nothing is stuck."""
    monkeypatch.setattr(residents_module, "DRAIN", 0.2)
    models = [fake_model(tmp_path, f"m{i}", load_seconds=0.02 * i, step_seconds=0.002) for i in range(4)]
    generator = random.Random(7)
    outcomes: list[str] = []

    async def client(residents: Residents) -> None:
        for _ in range(5):
            model = generator.choice(models)
            action = generator.choice(["stream", "stream", "stream", "leave", "unload", "resize", "kill"])
            options = {"num_ctx": generator.choice([64, 128, 256])} if action == "resize" else {}
            try:
                async with asyncio.timeout(generator.random() * 0.2 if action == "leave" else 15):
                    if action == "unload":
                        await residents.unload(model)
                        continue
                    async with residents.use(model, options, generator.choice([None, 0, 0.05, -1])) as loaded:
                        if action == "kill" and generator.random() < 0.2:
                            loaded.engine.kill()
                        assert await collect(loaded.engine, 10) == list(range(1, 11))
                        outcomes.append("ok")
            except (EngineError, TimeoutError) as error:
                outcomes.append(type(error).__name__)
                assert action == "leave" or not isinstance(error, TimeoutError), "stuck"

    async def check(residents: Residents) -> None:
        monkeypatch.setattr(residents._breaker, "record", lambda key, reason: None)
        await asyncio.gather(*(client(residents) for _ in range(40)))
        assert outcomes.count("ok") > 50, outcomes
        assert all(resident.users == 0 and not resident.retiring for resident in residents._residents.values())

    with_residents(check, max_loaded_models=2)
