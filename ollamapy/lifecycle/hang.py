"""Tells an engine that hangs from one that takes long: it owes an answer, and neither sends nor computes nor reads."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

CHECK = 5.0  # seconds between two looks
AFTER = 20.0  # seconds without an event and without work: stopped or deadlocked
BUSY_AFTER = 600.0  # seconds without an event though it works: a step of a big prompt on a small CPU takes seconds
BUSY_SHARE = 0.01  # of one core; waiting for a GPU spins, so it counts as computing


async def until_hung(pid: int, last_event: Callable[[], float], owes: Callable[[], bool], *, loading: bool = False) -> float:
    """Returns how many seconds it has been silent, once process `pid` hangs; never, when it does not.

    `last_event`: time.monotonic() of the last thing it sent. `owes`: whether a request waits for it. `loading`: it may work for
    as long as it likes, and to wait for a disk, or for another process's lock, is work. Elsewhere a thread that the kernel does
    not let go is one whose GPU hangs.
    """
    seen, before, idle_since = last_event(), _Work(-1.0), time.monotonic()
    owed_since = idle_since  # an idle engine has long been silent when a request comes
    while True:
        asleep = time.monotonic()
        await asyncio.sleep(CHECK)
        now = time.monotonic()
        paused = now - asleep > CHECK + AFTER / 2  # this process, and so the engine: Ctrl+Z, a machine that was halted
        if paused or last_event() != seen or not owes():
            seen, before, idle_since, owed_since = last_event(), _Work(-1.0), now, now
            continue
        try:
            work = await asyncio.to_thread(_look, pid, loading)
        except psutil.Error:
            continue  # it is gone, which its socket tells
        if work.cpu - before.cpu > CHECK * BUSY_SHARE or work.read != before.read or work.waits:
            idle_since = now
        before = work
        silent_since = max(seen, owed_since)
        if now - idle_since >= AFTER or now - silent_since >= (math.inf if loading else BUSY_AFTER):
            return now - silent_since


class _Work(NamedTuple):
    """What a process has done so far: seconds of CPU time, with those of compilers and others that it started; bytes that it
    has read. `waits`: it would do more, but for what it waits for."""

    cpu: float
    read: int = 0
    waits: bool = False


def _look(pid: int, loading: bool) -> _Work:
    """Raises psutil.Error when it is gone."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    cpu = sum(each.user + each.system + each.children_user + each.children_system for each in times)
    if sys.platform != "linux":
        return _Work(cpu)
    states = _thread_states(pid)
    return _Work(cpu, _bytes_read(process), "R" in states or (loading and ("D" in states or _waits_for_a_lock(pid))))


def _bytes_read(process: psutil.Process) -> int:
    """By calls and, of what is mapped, from disks; 0 where that may not be known."""
    with suppress(psutil.AccessDenied):
        io = process.io_counters()
        return int(io.read_chars + io.read_bytes)
    return 0


def _thread_states(pid: int) -> set[str]:
    """Letters of proc_pid_stat(5): R runs or is ready to, S sleeps, D waits for a disk, T is stopped."""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            states.add(stat.read_text().rpartition(")")[2].split()[0])
    return states


def _waits_for_a_lock(pid: int) -> bool:
    """Of a file, as long as another process builds kernels for both (`_build.built_once`)."""
    with suppress(OSError):
        rows = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return any(row[1] == "->" and row[5] == str(pid) for row in rows)
    return False
