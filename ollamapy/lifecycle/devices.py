"""What this machine has: cores, memory, GPUs. Measured without torch or a CUDA context; decides nothing."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

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
