"""Loading on demand, sharing, keep_alive, eviction, queue limits, crashes: real engine processes, fakes inside them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from ollamapy.api import options as api_options
from ollamapy.engine.protocol import SamplingParams
from ollamapy.env import FOREVER, Settings
from ollamapy.errors import EngineError, NotFound, OllamapyError, ServerBusy, TokenizerError, UnsupportedModel
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle import process
from ollamapy.lifecycle import residents as residents_module
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, FakeModel, collect, exists, fake_model, llama_keys, open_fds, write_model, written
from tests.tokenizer.builders import bpe_metadata

GIB = 1 << 30
MACHINE = Devices(cpu_cores=2, total_memory=8 * GIB, free_memory=8 * GIB)
Test = Callable[[Residents], Coroutine[Any, Any, None]]


def run(test: Test, discover: Callable[[], Devices] = lambda: MACHINE, **settings: Any) -> None:
    """Runs `test` with Residents of fakes; afterwards no process, task or file descriptor may be left."""

    async def main() -> None:
        residents = Residents(Settings(**settings), discover=discover, spawner=Spawner(COMMAND))
        residents.start()
        pid = residents._spawner.pid
        try:
            await asyncio.wait_for(test(residents), 20)
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


def test_use_loads_and_gives_what_a_request_needs(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.1)

    async def check(residents: Residents) -> None:
        async with residents.use(model, api_options.Options(), None) as loaded:
            assert loaded.model is model
            assert await collect(loaded.engine, 3) == [1, 2, 3]
            assert loaded.tokenizer.decode(loaded.tokenizer.encode("a")) == "a"
            assert loaded.config.embedding_length == 64
            assert loaded.metadata["general.architecture"] == "llama"
            assert "tokenizer.ggml.tokens" not in loaded.metadata
            assert loaded.context_length == 4096
            assert loaded.load_ns >= 100_000_000
        async with residents.use(model, {}) as again:
            assert again.load_ns < 50_000_000
            (row,) = residents.running()
            assert (row.name, row.digest, row.size, row.size_vram) == (model.name, model.digest, 1500, 0)
            assert (row.context_length, row.num_requests) == (4096, 1)
            assert row.resident_bytes > 1 << 20
            assert row.expires_at is not None and 290 < row.expires_at.timestamp() - time.time() <= 300

    run(check)


def test_concurrent_uses_load_once_and_two_names_share_an_engine(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    model = fake_model(tmp_path, "one", load_seconds=0.2, trace=str(trace))
    other = FakeModel(fake_model(tmp_path, "alias").name, "another digest", model.model_path)

    async def check(residents: Residents) -> None:
        pids = await asyncio.gather(*(hold(residents, m, 0.05) for m in [model, other] * 10))
        assert len(set(pids)) == 1
        assert len(loads(trace)) == 1
        async with residents.use(other, {}) as loaded:
            assert loaded.model is other
        drafted = FakeModel(model.name, model.digest, model.model_path, draft_path=model.model_path)
        assert await hold(residents, drafted) not in pids

    run(check)


@pytest.mark.parametrize(
    ("default", "requests", "lifetime"),
    [
        (0.3, [None], 0.3),  # absent: the setting
        (0.3, [0.0], 0.0),
        (60.0, [0.2], 0.2),
        (60.0, [-1.0, 0.2], 0.2),  # the later one wins
        (0.1, [-1.0, None], FOREVER),  # absent keeps the current
        (60.0, [0.3, None], 0.3),
        (0.1, [-1], FOREVER),
        (0.1, [1e300], FOREVER),
        (FOREVER, [None], FOREVER),
        (0.0, [None], 0.0),
    ],
)
def test_keep_alive(tmp_path: Path, default: float, requests: list[float | None], lifetime: float) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        for keep_alive in requests:
            pid = await hold(residents, model, keep_alive=keep_alive)
        if lifetime == FOREVER:
            await asyncio.sleep(0.3)
            assert residents.running()[0].expires_at is None
        elif lifetime == 0:
            assert not residents.running()
            await within(1, lambda: not exists(pid))
        else:
            await asyncio.sleep(lifetime / 2)
            expires = residents.running()[0].expires_at
            assert expires is not None and abs(expires.timestamp() - time.time() - lifetime / 2) < 0.1
            await asyncio.sleep(lifetime / 2 + 0.05)
            assert not residents.running()
            await within(1, lambda: not exists(pid))

    run(check, keep_alive=default)


def test_a_busy_model_is_never_unloaded_and_its_time_starts_when_the_last_request_ends(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        long = asyncio.create_task(hold(residents, model, 0.6, keep_alive=0.2))
        await within(2, lambda: bool(residents.running()))
        await hold(residents, model)
        await hold(residents, model, keep_alive=0)
        await asyncio.sleep(0.3)
        assert residents.running()[0].num_requests == 1, "0 waits for the others"
        await hold(residents, model, keep_alive=0.3)
        await long
        await asyncio.sleep(0.15)
        assert residents.running(), "counted from the end of the last request"
        await asyncio.sleep(0.25)
        assert not residents.running()

    run(check)


def test_idle_models_are_evicted_by_keep_alive_then_by_last_use(tmp_path: Path) -> None:
    models = {name: fake_model(tmp_path, name) for name in "abcde"}

    async def check(residents: Residents) -> None:
        await hold(residents, models["a"], keep_alive=-1)
        await hold(residents, models["b"], keep_alive=300)
        await hold(residents, models["c"], keep_alive=300)
        await hold(residents, models["b"])
        await hold(residents, models["d"])  # c is the longest unused of the shortest keep_alive
        assert names(residents) == {"a", "b", "d"}
        await hold(residents, models["c"], keep_alive=100)
        assert names(residents) == {"a", "d", "c"}
        await hold(residents, models["e"])
        assert names(residents) == {"a", "d", "e"}, "the shortest keep_alive, though used last"

    run(check, max_loaded_models=3)


def test_an_idle_model_goes_before_a_busy_one_and_a_busy_one_is_waited_for(tmp_path: Path) -> None:
    a, b, c = (fake_model(tmp_path, name) for name in "abc")

    async def check(residents: Residents) -> None:
        busy = asyncio.create_task(hold(residents, a, 0.5, keep_alive=1))
        await within(2, lambda: bool(residents.running()))
        await hold(residents, b, keep_alive=-1)
        holder = asyncio.create_task(hold(residents, c, 2, keep_alive=-1))
        await within(2, lambda: names(residents) == {"a", "c"})
        assert not busy.done()
        await hold(residents, b)  # both are busy: a, with the shorter keep_alive, is awaited
        assert busy.done() and not holder.done()
        assert names(residents) == {"b", "c"}
        holder.cancel()
        await asyncio.wait([holder])

    run(check, max_loaded_models=2)


def test_new_requests_for_a_model_marked_for_eviction_queue_behind(tmp_path: Path) -> None:
    a, b = (fake_model(tmp_path, name) for name in "ab")

    async def check(residents: Residents) -> None:
        first = asyncio.create_task(hold(residents, a, 0.3))
        await within(2, lambda: bool(residents.running()))
        second = asyncio.create_task(hold(residents, b, 0.1))
        await asyncio.sleep(0.05)
        third = asyncio.create_task(hold(residents, a))
        done, _ = await asyncio.wait([second, third], return_when=asyncio.FIRST_COMPLETED)
        assert done == {second}, "a stream of requests for a cannot starve b"
        assert await third != await first

    run(check, max_loaded_models=1)


def test_loaded_models_serve_while_another_loads_and_loads_are_first_come_first_served(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    ready = fake_model(tmp_path, "ready")
    slow = [fake_model(tmp_path, f"slow{i}", load_seconds=0.3, trace=str(trace)) for i in range(2)]

    async def check(residents: Residents) -> None:
        await hold(residents, ready)
        tasks = [asyncio.create_task(hold(residents, model)) for model in slow]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        async with residents.use(ready, {}) as loaded:
            assert await collect(loaded.engine, 3) == [1, 2, 3]
        assert time.monotonic() - start < 0.15
        await within(2, lambda: tasks[0].done())
        assert not tasks[1].done(), "one load at a time"
        await asyncio.gather(*tasks)
        assert [Path(plan["model_path"]).stem for plan in loads(trace)] == ["slow0", "slow1"]

    run(check)


def test_queue_limit_while_loading(tmp_path: Path) -> None:
    model, other = fake_model(tmp_path, "one", load_seconds=0.4), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        tasks = [asyncio.create_task(hold(residents, model)) for _ in range(3)]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        with pytest.raises(ServerBusy) as busy:
            await hold(residents, model)
        assert time.monotonic() - start < 0.1
        assert str(busy.value) == "server busy, please try again.  maximum pending requests exceeded"
        assert busy.value.retry_after >= 1
        await asyncio.gather(*tasks, hold(residents, other))

    run(check, max_queue=2)


def test_queue_limit_of_a_loaded_model(tmp_path: Path) -> None:
    model, other = fake_model(tmp_path, "one"), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        await hold(residents, model, 0, {"num_batch": 4})
        tasks = [asyncio.create_task(hold(residents, model, 0.4)) for _ in range(6)]
        await asyncio.sleep(0.1)
        with pytest.raises(ServerBusy):  # 4 run, 2 wait
            await hold(residents, model)
        await hold(residents, other)
        await asyncio.gather(*tasks)
        await hold(residents, model)

    run(check, max_queue=2)


def test_a_context_that_the_blocks_hold_needs_no_reload(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model, 0, {"num_ctx": 1024})
        async with residents.use(model, {"num_ctx": 4096}) as loaded:  # there are blocks for eight of 1024
            assert (loaded.engine.pid, loaded.context_length, loaded.max_context) == (pid, 1024, 8192)
        assert await hold(residents, model, 0, {"num_ctx": 8192}) == await hold(residents, model) == pid
        assert await hold(residents, model, 0, {"num_ctx": 1 << 20}) == pid, "capped at the trained 8192"

    run(check)


def test_a_smaller_context_needs_no_reload_and_one_beyond_the_blocks_waits_for_the_running(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    model = fake_model(tmp_path, "one", trace=str(trace))

    async def check(residents: Residents) -> None:
        first = asyncio.create_task(hold(residents, model, 0.4, {"num_ctx": 1024}, keep_alive=-1))
        await within(2, lambda: bool(residents.running()))
        pid = await hold(residents, model, 0, {"num_ctx": 512})
        assert await hold(residents, model) == pid, "no choice: what is loaded will do"
        larger = asyncio.create_task(hold(residents, model, 0.1, {"num_ctx": 2048}))
        await asyncio.sleep(0.05)
        same_again = asyncio.create_task(hold(residents, model, 0, {"num_ctx": 1024}))
        await asyncio.sleep(0.1)
        assert not larger.done() and not same_again.done() and not first.done()
        assert await larger not in (pid, await first)
        assert await same_again == await larger
        assert [plan["context_length"] for plan in loads(trace)] == [1024, 2048]
        assert residents.running()[0].expires_at is None, "a reload keeps the keep_alive"
        await hold(residents, model, 0, {"num_ctx": 1 << 20})  # capped at the trained 8192
        await hold(residents, model, 0, {"num_ctx": 1 << 21})
        assert [plan["context_length"] for plan in loads(trace)] == [1024, 2048, 8192]

    run(check, num_parallel=1)


@pytest.mark.parametrize(
    ("first", "second", "reload"),
    [
        ({}, {"num_thread": 1}, True),
        ({}, {"num_thread": 2}, False),  # what the machine has
        ({"num_thread": 1}, {}, False),
        ({}, {"num_gpu": 0}, False),
        ({}, {"num_gpu": 99}, False),  # there is no GPU
        ({"num_gpu": 0}, {"num_gpu": 99}, True),
        ({}, {"main_gpu": 1, "use_mmap": False, "temperature": 1.0}, False),
        ({}, {"num_batch": 64}, True),
    ],
)
def test_options_that_need_another_engine(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], reload: bool
) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model, options=first)
        assert (await hold(residents, model, options=second) != pid) is reload
        assert len(residents.running()) == 1

    run(check)


def test_waiters_with_different_needs_all_get_what_they_need(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.1)

    async def use(residents: Residents, num_ctx: int) -> int:
        async with residents.use(model, {"num_ctx": num_ctx}) as loaded:
            return loaded.max_context - num_ctx

    async def check(residents: Residents) -> None:
        assert min(await asyncio.gather(*(use(residents, 256 * n) for n in (1, 4, 2, 3, 4, 1)))) >= 0

    run(check, num_parallel=1)


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

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


def test_a_new_request_right_after_a_load_was_given_up(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.2)

    async def check(residents: Residents) -> None:
        first = asyncio.create_task(hold(residents, model))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0)
        assert await hold(residents, model)
        assert len(residents.running()) == 1

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


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


def test_memory_decides_what_is_evicted(tmp_path: Path) -> None:
    """Each fake engine promises to take 1 GiB, which it has not touched yet."""
    a, b, c = (fake_model(tmp_path, name, weight_bytes=GIB) for name in "abc")
    huge = fake_model(tmp_path, "huge")
    free = [int(2.1 * GIB)]

    async def check(residents: Residents) -> None:
        for model in (a, b):
            await hold(residents, model)
        assert names(residents) == {"a", "b"}
        await hold(residents, c)
        assert names(residents) == {"b", "c"}, "the room that loaded models were promised is not given away"
        free[0] = GIB // 8
        with pytest.raises(EngineError, match=r"requires more system memory \(.*than is available"):
            await hold(residents, huge)
        assert names(residents) == set(), "it would fit an empty machine, so all were tried"
        free[0] = 2 * GIB
        await hold(residents, a)

    run(check, discover=lambda: Devices(2, 4 * GIB, free[0]))


def test_nothing_is_evicted_for_a_model_that_never_fits(tmp_path: Path) -> None:
    a, huge = fake_model(tmp_path, "a"), fake_model(tmp_path, "huge")

    async def check(residents: Residents) -> None:
        await hold(residents, a)
        sizes.append(GIB // 8)
        with pytest.raises(EngineError, match="requires more system memory"):
            await hold(residents, huge)
        assert names(residents) == {"a"}

    sizes = [GIB]
    run(check, discover=lambda: Devices(2, sizes[-1], sizes[-1]))


def test_a_reload_does_not_build_the_tokenizer_again_but_a_changed_file_does(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def tokenizer(residents: Residents) -> object:
        async with residents.use(model, {}, 0) as loaded:
            return loaded.tokenizer

    async def check(residents: Residents) -> None:
        first = await tokenizer(residents)
        assert await tokenizer(residents) is first
        assert model.model_path is not None
        os.utime(model.model_path, ns=(1, 1))
        assert await tokenizer(residents) is not first
        for i in range(5):
            await hold(residents, fake_model(tmp_path, f"other{i}"), keep_alive=0)
        assert len(residents._files._files) == 4

    run(check)


def test_metadata_and_tokenizer_are_in_one_spelling(tmp_path: Path) -> None:
    """A mistral3 file as Ollama writes it: its tokenizer's `pre` is understood, its keys are llama.cpp's."""
    model = fake_model(tmp_path, "one")
    keys = {f"mistral3.{key}": value for key, value in llama_keys().items()}
    vocabulary = bpe_metadata(["a b"], pre="default")
    metadata = {"general.architecture": "mistral3", **keys, "mistral3.rope.scaling.beta_fast": 4.0, **vocabulary}
    assert model.model_path is not None
    write_gguf(model.model_path, metadata, [("token_embd.weight", GGMLType.F32, (257, 64), bytes(4 * 257 * 64))])

    async def check(residents: Residents) -> None:
        async with residents.use(model, {}) as loaded:
            assert loaded.metadata["mistral3.rope.scaling.yarn_beta_fast"] == 4.0
            assert loaded.metadata["tokenizer.ggml.pre"] == "tekken"
            assert loaded.tokenizer.encode("ab") == [256]

    run(check)


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

    run(check, max_loaded_models=2)
