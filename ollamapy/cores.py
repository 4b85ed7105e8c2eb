"""How many cores there are for this process, and how many threads the kernels can have. Starts none."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import psutil

MAX_THREADS = 256  # of the kernels' team (csrc/cpu/width.h)
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Cores that this process may use: physical ones (hyper-threads do not help a matmul), within affinity and CPU quota."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no quota, or no control groups
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
