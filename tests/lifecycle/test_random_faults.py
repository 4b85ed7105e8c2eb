"""Engines that hang or run out of memory at random moments, many times, beside one whose answers must stay what they are.

Each request ends with its whole answer or with an error that says why; the next one is served.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from ollamapy.engine.protocol import SamplingParams
from ollamapy.errors import EngineError
from ollamapy.lifecycle import hang
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.process import DIED, LOAD_TIMED_OUT
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import COMMAND
from ollamapy.names import ModelName
from tests.lifecycle.fakes import FakeModel, descendants, fake_model
from tests.lifecycle.running import with_residents, within
from tests.scripted import write_scripted

OPTIONS = {"num_ctx": 2048}
WHOLE = "whole"
ROUNDS = pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.slow)])


async def answer(residents: Residents, model: FakeModel, tokens: int, prompt: int = 3) -> list[int]:
    """Greedy, of a prompt of so many tokens."""
    ids: list[int] = []
    async with residents.use(model, OPTIONS) as loaded:
        async for output in loaded.engine.generate([4] * prompt, SamplingParams(temperature=0.0, max_tokens=tokens)):
            ids += output.token_ids
    return ids


async def outcome(residents: Residents, model: FakeModel, tokens: int, whole: list[int], prompt: int = 3) -> str:
    """WHOLE, or what the error says."""
    try:
        ids = await answer(residents, model, tokens, prompt)
    except EngineError as error:
        return str(error)
    assert ids == whole[:tokens]
    return WHOLE


def engines(residents: Residents) -> set[int]:
    return descendants(residents._spawner.pid or 0)


@asynccontextmanager
async def beside(residents: Residents, model: FakeModel) -> AsyncIterator[int]:
    """Answers of another model, one after the other, each of which must be as the first; gives its engine's pid."""
    residents._breaker.record = lambda key, reason: None  # type: ignore[method-assign]
    expected, ended, answers = await answer(residents, model, 100), False, 0
    (pid,) = engines(residents)

    async def go_on() -> None:
        nonlocal answers
        while not ended:
            assert await answer(residents, model, 100) == expected
            answers += 1
            await asyncio.sleep(0.02)

    task = asyncio.create_task(go_on())
    yield pid
    ended = True
    await task
    assert answers > 0 and engines(residents) >= {pid}


def real_model(folder: Path, name: str) -> FakeModel:
    """A real model, that is, of a few kilobytes, whose answer never ends."""
    path = write_scripted(folder / f"{name}.gguf", [f"\u2581{name}{n}" for n in range(100)], loop=True)
    return FakeModel(ModelName.parse(name), f"digest-{name}", path)


def told(outcomes: Counter[str], *texts: str) -> int:
    """How many got one of these errors; no other may be there."""
    errors = {text: count for text, count in outcomes.items() if text != WHOLE}
    assert all(any(part in error for part in texts) for error in errors), errors
    return sum(errors.values())


@pytest.mark.slow
def test_real_engines_stopped_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, in the prompt, in the answer, idle: SIGSTOP is found, the engine replaced, and its requests are told."""
    monkeypatch.setattr(hang, "CHECK", 0.2)
    monkeypatch.setattr(hang, "AFTER", 1.0)
    model, other = real_model(tmp_path, "stopped"), real_model(tmp_path, "other")
    rng, outcomes, stops, waits = random.Random(3), Counter[str](), 0, [0.0]

    async def check(residents: Residents) -> None:
        nonlocal stops
        whole = await answer(residents, model, 600)
        await residents.unload(model)
        async with beside(residents, other) as pid:
            while stops < 60:
                lengths = [(rng.randrange(1, 600), rng.choice([3, 1000])) for _ in range(4)]
                tasks = [asyncio.create_task(outcome(residents, model, n, whole, prompt)) for n, prompt in lengths]
                await asyncio.sleep(rng.random() * 0.6)
                stopped = engines(residents) - {pid}
                for each in stopped:
                    os.kill(each, signal.SIGSTOP)
                stops, start = stops + len(stopped), time.monotonic()
                outcomes.update(await asyncio.wait_for(asyncio.gather(*tasks), 20))
                waits.append(time.monotonic() - start)
                if stopped & engines(residents):  # they had all been answered
                    outcomes[await outcome(residents, model, 5, whole)] += 1
                assert await outcome(residents, model, 5, whole) == WHOLE
                assert not stopped & engines(residents)
                if rng.random() < 0.5:
                    await residents.unload(model)

    with_residents(check, Devices.discover, COMMAND, seconds=1200)
    print(outcomes, f"the longest until all were told: {max(waits):.1f} s")
    assert told(outcomes, "did not answer", LOAD_TIMED_OUT) > 60 and outcomes[WHOLE] > 10


@pytest.mark.parametrize("stops", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_real_engines_stopped_in_their_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path, stops: int
) -> None:
    """All who wait for it are told why, long before a load without progress is given up, and the next one is served."""
    monkeypatch.setattr(hang, "CHECK", 0.2)
    monkeypatch.setattr(hang, "AFTER", 2.0)
    model, other = FakeModel(ModelName.parse("smollm2"), "d", smollm2_path), real_model(tmp_path, "other")
    rng, outcomes, waits = random.Random(7), Counter[str](), list[float]()

    async def check(residents: Residents) -> None:
        whole = await answer(residents, model, 6)
        (row,) = residents.running()
        await residents.unload(model)
        async with beside(residents, other) as pid:
            while len(waits) < stops:
                await residents.unload(model)
                tasks = [asyncio.create_task(outcome(residents, model, 6, whole)) for _ in range(3)]
                await within(20, lambda: bool(engines(residents) - {pid}))
                await asyncio.sleep(rng.random() * row.info.load_ns / 1e9)
                (stopped,) = engines(residents) - {pid}
                os.kill(stopped, signal.SIGSTOP)
                start = time.monotonic()
                ends = Counter(await asyncio.wait_for(asyncio.gather(*tasks), 30))
                if any(text.startswith(LOAD_TIMED_OUT) for text in ends):
                    waits.append(time.monotonic() - start)
                    assert ends.total() == max(ends.values()), ends
                elif stopped in engines(residents):  # they had all been answered
                    await outcome(residents, model, 5, whole)
                outcomes.update(ends)
                assert await outcome(residents, model, 6, whole) == WHOLE, "of the engine after it"
                assert stopped not in engines(residents)

    with_residents(check, Devices.discover, COMMAND, seconds=280)
    print(outcomes, f"until all were told: median {sorted(waits)[len(waits) // 2]:.1f} s, most {max(waits):.1f} s")
    assert told(outcomes, "did not answer", LOAD_TIMED_OUT) >= 3 * stops


@ROUNDS
def test_steps_that_sleep_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr(hang, "CHECK", 0.2)
    monkeypatch.setattr(hang, "AFTER", 1.5)  # a machine that is very busy must not stop the engine beside for so long
    outcomes = faulty_steps(tmp_path, rounds, lambda at: {"hang_at_token": at})
    assert told(outcomes, "did not answer") >= rounds and outcomes[WHOLE] >= rounds


@ROUNDS
def test_memory_that_runs_out_at_random_steps(tmp_path: Path, rounds: int) -> None:
    outcomes = faulty_steps(tmp_path, rounds, lambda at: {"memory_error_at_token": at})
    assert told(outcomes, "out of memory on cpu") >= rounds and outcomes[WHOLE] >= rounds


@ROUNDS
def test_memory_that_runs_out_at_load(tmp_path: Path, rounds: int) -> None:
    """Of all who wait for the load; the model beside goes on, and one that fits is loaded next."""
    outcomes = Counter[str]()

    async def check(residents: Residents) -> None:
        async with beside(residents, fake_model(tmp_path, "other", step_seconds=0.002)):
            for number in range(rounds):
                broken = fake_model(tmp_path, f"m{number}", memory_error_at_load=True, load_seconds=0.05)
                outcomes.update(await asyncio.gather(*(outcome(residents, broken, 5, []) for _ in range(4))))
                fitting = fake_model(tmp_path, f"n{number}")
                assert await answer(residents, fitting, 5) == [1, 2, 3, 4, 5]
                await residents.unload(fitting)

    with_residents(check, seconds=600)
    assert told(outcomes, "out of memory on cpu") == 4 * rounds


def faulty_steps(folder: Path, rounds: int, fault: Callable[[int], dict[str, int]]) -> Counter[str]:
    """What became of requests to engines with a fault at a random token, which at least one of four reaches."""
    rng, outcomes, numbers = random.Random(9), Counter[str](), list(range(1, 101))

    async def check(residents: Residents) -> None:
        async with beside(residents, fake_model(folder, "other", step_seconds=0.002)):
            for number in range(rounds):
                at = rng.randrange(2, 60)
                model = fake_model(folder, f"m{number}", step_seconds=0.003, **fault(at))
                lengths = [at, *(rng.randrange(1, 100) for _ in range(3))]
                outcomes.update(await asyncio.gather(*(outcome(residents, model, n, numbers) for n in lengths)))
                assert await outcome(residents, model, at - 1, numbers) == WHOLE, "of the engine after it"
                outcomes[WHOLE] += 1
                await residents.unload(model)

    with_residents(check, seconds=600)
    print(outcomes)
    return outcomes


@pytest.mark.slow
def test_real_engines_without_more_memory(tmp_path: Path, smollm2_path: Path) -> None:
    """From a random moment on the kernel gives an engine little or nothing more: in its load, in a prompt, in an answer."""
    model, other = FakeModel(ModelName.parse("smollm2"), "d", smollm2_path), real_model(tmp_path, "other")
    rng, outcomes, limits = random.Random(4), Counter[str](), 0

    async def check(residents: Residents) -> None:
        nonlocal limits
        expected = {prompt: await answer(residents, model, 6, prompt) for prompt in (5, 300)}
        await residents.unload(model)
        async with beside(residents, other) as pid:
            while limits < 60:
                await residents.unload(model)
                prompts = [rng.choice([5, 300]) for _ in range(3)]
                tasks = [asyncio.create_task(outcome(residents, model, 6, expected[prompt], prompt)) for prompt in prompts]
                await asyncio.sleep(rng.random() * rng.choice([0.2, 1.5]))
                for each in engines(residents) - {pid}:
                    process = psutil.Process(each)
                    most = process.memory_info().vms + rng.choice([-1 << 30, 0, 1 << 20, 1 << 24, 1 << 26])
                    process.rlimit(psutil.RLIMIT_AS, (most, resource.RLIM_INFINITY))
                    limits += 1
                outcomes.update(await asyncio.wait_for(asyncio.gather(*tasks), 60))

    with_residents(check, Devices.discover, COMMAND, seconds=1200)
    print(outcomes)
    assert told(outcomes, "out of memory", "no memory for", "can't start new thread", DIED) > 10 and outcomes[WHOLE] > 10
