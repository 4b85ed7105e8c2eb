"""The soak's judgement on made-up samples, and half a minute less of it on a real daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from bench import soak
from bench.machine import ROOT


def rows(**growth: float) -> list[dict[str, float]]:
    """A sample every 2 s for 20 minutes; `growth` is of the whole time."""
    names = {"daemon memory": 100.0, "engine memory": 400.0, "engine files": 30.0, "used blocks": 50.0}
    slopes = {name: growth.get(name.replace(" ", "_"), 0.0) / 1200 for name in names}
    return [
        {"seconds": second, **{name: start * (1 + slopes[name] * second) for name, start in names.items()}}
        for second in range(0, 1200, 2)
    ]


def report(samples: list[dict[str, float]], **end: float) -> dict[str, Any]:
    begin = {"used blocks": 0.0, "num running": 0.0, "num waiting": 0.0, "daemon tasks": 9.0}
    return {"failed": {}, "slopes": soak.slopes(samples), "begin": begin, "end": {**begin, **end}}


def test_flat_samples_are_clean() -> None:
    assert soak.faults(report(rows())) == []


def test_growth_is_found_and_named() -> None:
    assert soak.faults(report(rows(engine_memory=0.10))) == ["engine memory grew by 4.6% (limit 3%)"]
    line = [(float(at), 1.0 + 2.0 * at) for at in range(5)]
    assert soak.slope([*line, (5.0, 100.0)]) == pytest.approx(2.0), "one point does not make a slope"
    assert soak.slopes(rows(engine_memory=0.10))["engine memory"]["per_hour"] == pytest.approx(120.0)


def test_one_jump_in_the_warm_up_is_no_growth() -> None:
    samples = [{**row, "daemon memory": 50.0 if row["seconds"] < 300 else 100.0} for row in rows()]
    assert soak.faults(report(samples)) == []


def test_what_is_held_or_failed_is_told() -> None:
    found = report(rows(), **{"used blocks": 3.0, "daemon tasks": 10.0}) | {"failed": {"chat: 500": 2}}
    held = [f"still held at the end: {what}" for what in ("used blocks 3", "daemon tasks 10")]
    assert soak.faults(found) == ["2 times: chat: 500", *held]


def test_own_memory_is_what_no_file_backs() -> None:
    before = soak.own_memory(os.getpid())
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert (60 << 20) < soak.own_memory(os.getpid()) - before < (80 << 20)


@pytest.mark.slow
def test_a_short_soak_of_a_real_daemon_is_clean() -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "1", "--users", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    grown = [line for line in done.stdout.splitlines() if "grew" in line]  # a minute is too short to judge growth
    assert "load and unload" in done.stdout and "chat" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0 or grown, done.stdout[-3000:]
