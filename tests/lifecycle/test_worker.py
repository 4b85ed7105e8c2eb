"""The real engine process: torch preloaded, a real model, a real answer."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollamapy import extension
from ollamapy.cores import physical_cores
from ollamapy.engine.protocol import SamplingParams
from ollamapy.env import Settings
from ollamapy.errors import BadRequest, EngineError
from ollamapy.lifecycle.residents import Residents
from ollamapy.names import ModelName
from tests.conftest import golden
from tests.lifecycle.fakes import FakeModel, exists, write_model

NAME = ModelName.parse("smollm2:135m")
log = logging.getLogger(__name__)


async def generate(residents: Residents, model: FakeModel, ids: list[int], count: int) -> tuple[list[int], int, list[float]]:
    """Greedy tokens, the engine's pid, and seconds from the request until the model is there and until the first token."""
    start = time.monotonic()
    tokens: list[int] = []
    times: list[float] = []
    async with residents.use(model, {"num_ctx": 512}) as loaded:
        times.append(time.monotonic() - start)
        async for output in loaded.engine.generate(ids, SamplingParams(temperature=0.0, max_tokens=count)):
            if not tokens:
                times.append(time.monotonic() - start)
            tokens += output.token_ids
        return tokens, loaded.engine.pid, times


def test_cold_start_answer_crash_and_answer_again(smollm2_path: Path, tmp_path: Path) -> None:
    case = golden("smollm2-135m")["greedy"][0]
    ids, expected = case["prompt_ids"], case["ids"][:4]
    model = FakeModel(NAME, "", smollm2_path)

    async def main() -> None:
        residents = Residents(Settings(context_length=512, num_parallel=1))
        start = time.monotonic()
        residents.start()
        assert time.monotonic() - start < 0.5, "the daemon does not wait for torch"
        preloaded = await residents._spawner.ready()
        assert preloaded.num_threads == 1, "an import started a thread: forks are not safe"
        tokens, pid, times = await generate(residents, model, ids, 4)
        assert tokens == expected
        log.warning("imports %.2f s; model there after %.2f s, first token after %.2f s", preloaded.seconds, *times)
        async with residents.use(model, {}) as loaded:
            stats = await loaded.engine.stats()
            assert stats.integrity == "ok" and stats.used_blocks == 0
            assert (await loaded.engine.embed(ids)).num_tokens == len(ids)
            assert loaded.engine.info.weight_bytes > 50 << 20
            assert loaded.engine.info.kernels["linear"] == "csrc" and loaded.engine.info.cpu_isa == extension.isa() != ""
            assert (
                abs(residents._residents[(str(smollm2_path), "")].placement.weight_bytes / loaded.engine.info.weight_bytes - 1)
                < 0.2
            )
        assert min([await cpu_seconds_of_idling(pid) for _ in range(2)]) < 0.01, "no thread spins"
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            while residents.running():
                await asyncio.sleep(0.01)
        again, other_pid, _ = await generate(residents, model, ids, 4)
        assert again == expected and other_pid != pid
        await refusals(residents, model, tmp_path)
        await residents.close()
        assert not exists(other_pid)

    asyncio.run(main())


async def cpu_seconds_of_idling(pid: int) -> float:
    """What a process without a request takes in a second."""

    def used() -> int:
        tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks)

    await asyncio.sleep(0.1)
    before = used()
    await asyncio.sleep(1.0)
    return (used() - before) * 1e-9


async def refusals(residents: Residents, model: FakeModel, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"missing tensors: .*blk\.0"):
        await generate(residents, FakeModel(NAME, "", write_model(tmp_path / "hollow.gguf")), [1], 1)
    async with residents.use(model, {}) as loaded:
        with pytest.raises(EngineError, match="600 tokens"):
            await anext(loaded.engine.generate([1] * 600, SamplingParams(max_tokens=1)))


LOADS = """
import logging, os, sys
from ollamapy.engine.protocol import Plan
from ollamapy.lifecycle import worker
from ollamapy import ops
logging.basicConfig(level=logging.INFO)
most = 0
def progress(*_):
    global most
    most = max(most, len(os.listdir("/proc/self/task")))
before = len(os.listdir("/proc/self/task"))
worker.build_engine(Plan(sys.argv[1], num_threads=1, num_blocks=8), progress)
print(before, most)
"""


@pytest.mark.skipif(physical_cores() == 1, reason="nothing to leave alone")
def test_a_load_takes_no_more_threads_than_it_may(smollm2_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADS, str(smollm2_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, most = map(int, done.stdout.split())
    assert most == before + 1, "beside the thread that loads"
    assert re.search(rf"kernels: csrc \({extension.isa()}\): .*linear.*; reference: .*rope", done.stderr)


TOUCHES = """
import os, torch
def touched(*args, **kwargs):
    os.write(2, b"CUDA was started in the process that engines are forked from")
    os._exit(3)
torch.version.cuda = "13.0"
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "init", "_lazy_init"):
    setattr(torch.cuda, name, touched)
for name in ("is_available", "device_count", "current_accelerator", "set_device_index"):
    setattr(torch.accelerator, name, touched)
from ollamapy.lifecycle import forkserver
main, packed_on = forkserver._preload()
print(*packed_on)
"""


def test_what_engines_are_forked_from_asks_no_gpu() -> None:
    """Or torch would refuse each of them: "Cannot re-initialize CUDA in forked subprocess"."""
    done = subprocess.run([sys.executable, "-c", TOUCHES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "cuda"], "on a GPU, Triton's planes are as large as the file's blocks"
