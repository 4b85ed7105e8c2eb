"""Tells an engine that hangs from one that takes long: it owes an answer, and neither sends nor computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psutil

CHECK = 5.0  # seconds between two looks
AFTER = 20.0  # seconds without an event and without CPU time: stopped or deadlocked
BUSY_AFTER = 600.0  # seconds without an event though it computes: a step of a big prompt on a small CPU takes seconds
BUSY_SHARE = 0.01  # of one core; waiting for a GPU spins, so it counts as computing


async def until_hung(pid: int, last_event: Callable[[], float], owes: Callable[[], bool]) -> float:
    """Returns how many seconds it has been silent, once process `pid` hangs; never, when it does not.

    `last_event`: time.monotonic() of the last thing it sent. `owes`: whether a request waits for it.
    """
    seen, cpu_before, idle_since = last_event(), -1.0, time.monotonic()
    owed_since = idle_since  # an idle engine has long been silent when a request comes
    while True:
        asleep = time.monotonic()
        await asyncio.sleep(CHECK)
        now = time.monotonic()
        paused = now - asleep > CHECK + AFTER / 2  # this process, and so the engine: Ctrl+Z, a machine that was halted
        if paused or last_event() != seen or not owes():
            seen, cpu_before, idle_since, owed_since = last_event(), -1.0, now, now
            continue
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue  # it is gone, which its socket tells
        cpu = times.user + times.system
        if cpu - cpu_before > CHECK * BUSY_SHARE:
            idle_since = now
        cpu_before = cpu
        if now - idle_since >= AFTER or now - max(seen, owed_since) >= BUSY_AFTER:
            return now - max(seen, owed_since)
