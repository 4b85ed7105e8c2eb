"""One engine process from the daemon's side: real forkserver, real sockets, engines that misbehave."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ollamapy.engine.protocol import Loading, Output, Plan, SamplingParams
from ollamapy.errors import BadRequest, EngineError
from ollamapy.lifecycle import hang, process
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fake_forkserver import GARBAGE
from tests.lifecycle.fakes import COMMAND, collect, exists, open_fds, wait_until, write_faults, written

Test = Callable[[Spawner], Coroutine[Any, Any, None]]


def run(test: Test) -> None:
    """Runs `test` with a spawner of fakes; afterwards no process and no file descriptor may be left."""

    async def main() -> None:
        spawner = Spawner(COMMAND)
        spawner.start()
        pid = spawner.pid
        try:
            await asyncio.wait_for(test(spawner), 20)
        finally:
            spawner.close()
            assert pid is not None and not exists(pid)

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


async def within(seconds: float, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.005)


def plan(path: Path, **faults: Any) -> Plan:
    return Plan(str(write_faults(path, **faults)))


def test_start_generate_embed_stats_close(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        progress: list[Loading] = []
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", load_seconds=0.2), progress.append, 10)
        assert engine.info.context_length == 4096
        assert engine.info.load_ns >= 200_000_000
        assert [p.completed for p in progress] == sorted(p.completed for p in progress)
        assert len(progress) >= 2
        assert await asyncio.gather(*(collect(engine, n) for n in (1, 5, 20))) == [list(range(1, n + 1)) for n in (1, 5, 20)]
        embedding = await engine.embed([1, 2, 3])
        assert (len(embedding.vector), embedding.num_tokens) == (16, 3)
        stats = await asyncio.gather(engine.stats(), engine.stats())
        assert stats[0].num_steps >= 20
        assert engine.memory() > 1 << 20
        assert engine.num_requests == 0
        await engine.close()
        assert not engine.alive
        assert not exists(engine.pid)
        with pytest.raises(EngineError, match="unloaded"):
            await engine.stats()

    run(check)


def test_a_refused_request_fails_alone(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        other = asyncio.create_task(collect(engine, 10))
        with pytest.raises(EngineError, match="the prompt is empty"):
            await collect(engine, 5, prompt=0)
        with pytest.raises(EngineError, match="nothing to embed"):
            await engine.embed([])
        assert await other == list(range(1, 11))
        await engine.close()

    run(check)


def test_engine_has_one_thread_ignores_ctrl_c_and_leaves_no_core(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        assert (await spawner.ready()).num_threads == 1
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        assert engine.pid not in (spawner.pid, os.getpid())
        limits = Path(f"/proc/{engine.pid}/limits").read_text()
        assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core")] == ["0"]
        assert Path(f"/proc/{engine.pid}/oom_score_adj").read_text().strip() == "500"
        sockets = [os.readlink(p) for p in Path(f"/proc/{engine.pid}/fd").iterdir() if os.readlink(p).startswith("socket:")]
        assert len(sockets) == 1, "an engine holds its own socket and nobody else's"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.pid, number)
            os.kill(spawner.pid or 0, number)
        assert await collect(engine, 3) == [1, 2, 3]
        await engine.close()

    run(check)


def test_idle_engine_uses_no_cpu(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        await collect(engine, 2)
        ticks = Path(f"/proc/{engine.pid}/stat")
        switches = Path(f"/proc/{engine.pid}/status")

        def used() -> tuple[str, str]:
            return " ".join(ticks.read_text().split()[13:15]), switches.read_text().split("voluntary_ctxt_switches:")[
                1
            ].split()[0]

        await asyncio.sleep(0.05)
        before = used()
        await asyncio.sleep(0.5)
        assert used() == before
        await engine.close()

    run(check)


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

    run(check)


def test_an_error_in_a_step_reaches_its_requests_and_ends_the_process(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", raise_at_token=3))
        for result in await asyncio.gather(collect(engine, 9), collect(engine, 9), return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "device-side assert" in str(result)
        await asyncio.wait_for(engine.died.wait(), 1)
        await within(1, lambda: not exists(engine.pid))

    run(check)


def test_out_of_memory_in_a_step_says_so_and_the_next_engine_works(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", memory_error_at_token=3))
        for result in await asyncio.gather(*(collect(engine, 9) for _ in range(3)), return_exceptions=True):
            assert isinstance(result, EngineError) and "out of memory on cpu" in str(result)
        await within(1, lambda: not exists(engine.pid))
        again = await EngineProcess.start(spawner, plan(tmp_path / "n"))
        assert await collect(again, 3) == [1, 2, 3]
        await again.close()

    run(check)


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

    run(check)


def test_events_that_nobody_waits_for_are_passed_over(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m", garbage="a message for nobody"))
        assert await collect(engine, 9) == list(range(1, 10))
        assert (await engine.stats()).num_steps >= 9
        await engine.close()

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


def test_cancelling_a_load_leaves_no_process(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        task = asyncio.create_task(EngineProcess.start(spawner, plan(tmp_path / "h", hang_at_load=True, trace=str(trace))))
        await within(5, lambda: written(trace))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await within(1, lambda: not exists(int(trace.read_text().split()[1])))

    run(check)


def test_cancelling_before_the_fork_leaves_no_process(tmp_path: Path) -> None:
    """The request for a fork is on its way when nobody wants the engine any more."""

    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        await spawner.ready()
        for _ in range(5):
            task = asyncio.create_task(EngineProcess.start(spawner, plan(tmp_path / "h", hang_at_load=True, trace=str(trace))))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        children = Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children")
        await asyncio.sleep(0.1)  # time for the forks to happen
        await within(1, lambda: children.read_text() == "")

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


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

    run(check)


def test_an_engine_that_computes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "CHECK", 0.1)
    monkeypatch.setattr(hang, "AFTER", 0.3)
    monkeypatch.setattr(hang, "BUSY_AFTER", 1.2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        start = time.monotonic()
        silence = asyncio.run(asyncio.wait_for(hang.until_hung(busy.pid, lambda: start, lambda: True), 10))
        busy.kill()
    assert silence >= 1.2


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

    run(check)


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

    run(check)


def test_a_forkserver_that_cannot_start_is_an_error_not_a_wait(tmp_path: Path) -> None:
    async def main() -> None:
        broken = Spawner((sys.executable, "-c", "raise SystemExit(3)"))
        with pytest.raises(EngineError, match="status 3"):
            await asyncio.wait_for(EngineProcess.start(broken, Plan("x")), 5)
        with pytest.raises(EngineError, match="cannot start"):
            await asyncio.wait_for(broken.ready(), 5)
        broken.close()

    asyncio.run(main())


def test_on_the_event_loop_of_the_server(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        spawner = Spawner(COMMAND)
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        assert await collect(engine, 3) == [1, 2, 3]
        stream = asyncio.create_task(collect(engine, 100000))
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="unexpectedly stopped"):
            await asyncio.wait_for(stream, 1)
        await engine.close()
        spawner.close()

    uvloop.run(main())


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
