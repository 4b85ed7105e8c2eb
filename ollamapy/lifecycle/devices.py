"""What this machine has: cores, memory, GPUs. Measured without torch or a CUDA context; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

GPU_WAIT, GPU_POLL, GPU_SHARE = 5.0, 0.25, 0.75  # seconds, seconds, share of the memory: Ollama's
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class GPU:
    """An NVIDIA GPU. `index` is torch's: its place among the visible ones, in PCI bus order. Memory in bytes."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Devices:
    """Memory in bytes; `free_memory` is what can be had without swapping, within the control group's limit."""

    cpu_cores: int
    total_memory: int
    free_memory: int
    gpus: tuple[GPU, ...] = ()

    @classmethod
    def discover(cls, visible: str | None = None) -> Devices:
        """What is there now. `visible` is CUDA_VISIBLE_DEVICES. About 1 ms, and some more per GPU."""
        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
        for limit, used in _memory_limits(Path("/proc/self/cgroup")):
            total, free = min(total, limit), min(free, max(0, limit - used))
        return cls(physical_cores(), total, free, tuple(_gpus(visible)))

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


def physical_cores() -> int:
    """Cores that this process may use: physical ones (hyper-threads do not help a matmul), within affinity and CPU quota."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no quota, or no control groups
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


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


def _gpus(visible: str | None) -> Iterator[GPU]:
    try:
        import pynvml
    except ImportError:
        if Path("/dev/nvidia0").exists():
            log.warning("there is an NVIDIA GPU, but nvidia-ml-py is not installed: models run on the CPU")
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no GPU
        return
    if _torch_version().endswith("+cpu"):
        log.warning("there is an NVIDIA GPU, but this PyTorch is built for CPUs alone: models run on the CPU")
        pynvml.nvmlShutdown()
        return
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        for index, number in enumerate(visible_gpus(visible, uuids)):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handles[number])
            capability = pynvml.nvmlDeviceGetCudaComputeCapability(handles[number])
            name = _text(pynvml.nvmlDeviceGetName(handles[number]))
            yield GPU(index, name, int(memory.total), int(memory.free), (int(capability[0]), int(capability[1])))
    except pynvml.NVMLError as error:
        log.warning("GPUs cannot be queried (%s): models run on the CPU", error)
    finally:
        pynvml.nvmlShutdown()


def _torch_version() -> str:
    """As it is installed; "" for one that does not say."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def visible_gpus(visible: str | None, uuids: list[str]) -> list[int]:
    """NVML numbers of the GPUs that CUDA will show, in its order. As CUDA does, the list ends at the first bad entry."""
    if visible is None:
        return list(range(len(uuids)))
    numbers: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal() and int(entry) < len(uuids):
            number = int(entry)
        else:
            matches = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
            if len(matches) != 1:
                break
            number = matches[0]
        if number in numbers:
            return []  # CUDA: a duplicate makes none visible
        numbers.append(number)
    return numbers
