"""One engine process from the daemon's side: real forkserver, real sockets, engines that count."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from ollamapy.engine.protocol import Loading, Plan
from ollamapy.errors import EngineError
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.spawner import Spawner
from tests.lifecycle.fakes import COMMAND, collect, exists, open_fds, written
from tests.lifecycle.running import plan, with_spawner, within


def test_a_forkserver_launched_before_the_event_loop_serves_it(tmp_path: Path) -> None:
    """And one of which no loop ever heard is ended too."""
    before = open_fds()
    spawner = Spawner(COMMAND)
    spawner.launch()
    pid = spawner.pid
    assert pid is not None

    async def serve() -> None:
        engine = await EngineProcess.start(spawner, plan(tmp_path / "m"))
        assert spawner.pid == pid
        assert await collect(engine, 3) == [1, 2, 3]
        await engine.close()
        spawner.close()

    asyncio.run(asyncio.wait_for(serve(), 20))
    assert not exists(pid)
    unheard = Spawner(COMMAND)
    unheard.launch()
    assert (pid := unheard.pid) is not None
    unheard.close()
    unheard.close()
    assert not exists(pid)
    assert open_fds() == before


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

    with_spawner(check)


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

    with_spawner(check)


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

    with_spawner(check)


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

    with_spawner(check)


def test_a_forkserver_that_cannot_start_is_an_error_not_a_wait(tmp_path: Path) -> None:
    async def main() -> None:
        broken = Spawner((sys.executable, "-c", "raise SystemExit(3)"))
        with pytest.raises(EngineError, match="status 3"):
            await asyncio.wait_for(EngineProcess.start(broken, Plan("x")), 5)
        with pytest.raises(EngineError, match="cannot start"):
            await asyncio.wait_for(broken.ready(), 5)
        broken.close()

    asyncio.run(main())


def test_cancelling_a_load_leaves_no_process(tmp_path: Path) -> None:
    async def check(spawner: Spawner) -> None:
        trace = tmp_path / "trace"
        task = asyncio.create_task(EngineProcess.start(spawner, plan(tmp_path / "h", hang_at_load=True, trace=str(trace))))
        await within(5, lambda: written(trace))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await within(1, lambda: not exists(int(trace.read_text().split()[1])))

    with_spawner(check)


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

    with_spawner(check)


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
