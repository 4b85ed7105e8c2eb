"""Which model goes, when, to make room for another: by count, by memory, by keep_alive."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ollamapy.env import FOREVER
from ollamapy.errors import EngineError
from ollamapy.lifecycle import residents as residents_module
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.residents import Residents
from tests.lifecycle.fakes import exists, fake_model
from tests.lifecycle.running import GIB, hold, names, with_residents, within


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

    with_residents(check, keep_alive=default)


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

    with_residents(check)


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

    with_residents(check, max_loaded_models=3)


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

    with_residents(check, max_loaded_models=2)


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

    with_residents(check, max_loaded_models=1)


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

    with_residents(check, discover=lambda: Devices(2, 4 * GIB, free[0]))


def test_nothing_is_evicted_for_a_model_that_never_fits(tmp_path: Path) -> None:
    a, huge = fake_model(tmp_path, "a"), fake_model(tmp_path, "huge")

    async def check(residents: Residents) -> None:
        await hold(residents, a)
        sizes.append(GIB // 8)
        with pytest.raises(EngineError, match="requires more system memory"):
            await hold(residents, huge)
        assert names(residents) == {"a"}

    sizes = [GIB]
    with_residents(check, discover=lambda: Devices(2, sizes[-1], sizes[-1]))


def test_a_model_whose_users_never_end_is_evicted_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents_module, "PATIENCE", 0.2)
    a, b = (fake_model(tmp_path, name) for name in "ab")

    async def check(residents: Residents) -> None:
        stuck = asyncio.create_task(hold(residents, a, 1000, keep_alive=-1))
        await within(2, lambda: names(residents) == {"a"})
        await asyncio.wait_for(hold(residents, b), 5)
        again = asyncio.create_task(hold(residents, a, 1000, {"num_ctx": 64}))
        await within(5, lambda: names(residents) == {"a"})
        await asyncio.wait_for(hold(residents, a, options={"num_ctx": 8192}), 5)  # a reload, the same
        for task in (stuck, again):
            task.cancel()
        await asyncio.wait([stuck, again])

    with_residents(check, max_loaded_models=1)
