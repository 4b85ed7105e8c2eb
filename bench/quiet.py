"""Waits for a quiet machine and repeats what was disturbed. Knows no engine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
LIMIT = 0.04  # of all cores: what other processes may use during a measurement
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
LOOK = 1.0  # seconds that the machine is watched before one


class Quiet:
    """`patience`: seconds to spend on waiting and repeating in all; 0: everything is measured at once and kept."""

    def __init__(self, patience: float) -> None:
        self.deadline = time.monotonic() + patience
        self.others: list[float] = []  # share of all cores that others used during each measurement that was kept

    def run(self, measure: Callable[[], T]) -> T:
        """What `measure` returned when it was disturbed least; the first that was not, ends it."""
        found: list[tuple[float, T]] = []
        while not found or (found[-1][0] > LIMIT and time.monotonic() < self.deadline):
            self._wait()
            start, own, wall = busy(), own_seconds(), time.monotonic()
            result = measure()
            others = (busy() - start) - (own_seconds() - own)
            found.append((max(others, 0.0) / ((time.monotonic() - wall) * (psutil.cpu_count() or 1)), result))
        least = min(found, key=lambda pair: pair[0])
        self.others.append(round(least[0], 4))
        return least[1]

    def _wait(self) -> None:
        while time.monotonic() < self.deadline:
            start = busy()
            time.sleep(LOOK)
            if busy() - start <= LIMIT * LOOK * (psutil.cpu_count() or 1):
                return


def busy() -> float:
    """Seconds that all cores have worked since the system started."""
    times = psutil.cpu_times()
    return float(sum(times)) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def adopt() -> None:
    """Processes whose parents end before them become this process's children: their time is ours (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own_seconds() -> float:
    """Of this process and of its descendants that have ended."""
    for child in psutil.Process().children():
        if child.status() == psutil.STATUS_ZOMBIE:  # adopted: those it started itself have been waited for
            os.waitpid(child.pid, 0)
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)
