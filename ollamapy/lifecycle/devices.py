"""What this machine has: cores, memory, GPUs. Measured without torch or a CUDA context; decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ollamapy.cores import physical_cores as physical_cores
from ollamapy.env import Settings
from ollamapy.lifecycle.gpus import GPU, find_gpus

GPU_WAIT, GPU_POLL, GPU_SHARE = 5.0, 0.25, 0.75  # seconds, seconds, share of the memory: Ollama's
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Devices:
    """Memory in bytes; `free_memory` is what can be had without swapping, within the control group's limit."""

    cpu_cores: int
    total_memory: int
    free_memory: int
    gpus: tuple[GPU, ...] = ()

    @classmethod
    def discover(cls, settings: Settings | None = None) -> Devices:
        """What is there now; of GPUs what `settings` show. About 1 ms, and some more per GPU."""
        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
        for limit, used in _memory_limits(Path("/proc/self/cgroup")):
            total, free = min(total, limit), min(free, max(0, limit - used))
        return cls(physical_cores(), total, free, find_gpus(settings or Settings()))

    def emptied(self) -> Devices:
        """As if nothing used any memory."""
        gpus = tuple(replace(gpu, free=gpu.total) for gpu in self.gpus)
        return replace(self, free_memory=self.total_memory, gpus=gpus)

    def without(self, nbytes: int) -> Devices:
        """With less free memory on the CPU's side: what others have been promised."""
        return replace(self, free_memory=max(0, self.free_memory - nbytes))


async def wait_for_gpu_memory(discover: Callable[[], Devices], before: Devices, nbytes: int) -> None:
    """Until most of `nbytes` is free that was not `before`: a driver gives memory back a moment after a process has ended."""
    start = sum(gpu.free for gpu in before.gpus)
    end = time.monotonic() + GPU_WAIT
    while time.monotonic() < end:
        now = await asyncio.to_thread(discover)
        if sum(gpu.free for gpu in now.gpus) - start >= GPU_SHARE * nbytes:
            return
        await asyncio.sleep(GPU_POLL)


def _memory_limits(membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without page cache) of every control group that holds this process; version 2, then version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):  # in a container the group's own path may not be there: the root is
            found = _limit(place, *names)
            if found is not None:
                yield found
            if place == root:
                break


def _limit(folder: Path, limit: str, usage: str, reclaimable: str) -> tuple[int, int] | None:
    try:
        bytes_limit = int((folder / limit).read_text())  # "max": no limit, a ValueError
        used = int((folder / usage).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return bytes_limit, max(0, used - int(stat.get(reclaimable, 0)))
