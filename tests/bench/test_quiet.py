"""Waiting for a quiet machine, on made-up CPU times."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from bench import quiet
from bench.quiet import LIMIT, Quiet


def test_without_patience_the_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "busy", lambda: time.monotonic() * 10)
    gate = Quiet(0.0)
    assert gate.run(lambda: "once") == "once"
    assert len(gate.others) == 1 and gate.others[0] > LIMIT


def test_the_least_disturbed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others use 50, 30 and 0 % of the cores during three runs; a fourth is not needed."""
    clock = iter([0.5, 0.3, 0.0, 0.0])
    others = [0.0]

    def measure() -> float:
        share = next(clock)
        start = time.monotonic()
        time.sleep(0.05)
        others[0] += share * (time.monotonic() - start) * (psutil.cpu_count() or 1)
        return share

    monkeypatch.setattr(quiet, "LOOK", 0.0)
    monkeypatch.setattr(quiet, "busy", lambda: others[0])
    monkeypatch.setattr(quiet, "own_seconds", lambda: 0.0)
    gate = Quiet(10.0)
    assert gate.run(measure) == 0.0
    assert gate.others == [0.0] and next(clock) == 0.0


def test_own_work_is_not_anothers() -> None:
    before = quiet.own_seconds()
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        pass
    assert quiet.own_seconds() - before >= 0.04
    assert quiet.busy() > 0.0


ORPHAN = """
import subprocess, sys, time
from bench import quiet
if sys.argv[1] == "adopt":
    quiet.adopt()
before = quiet.own_seconds()
work = "import time\\nwhile time.process_time() < 0.5: pass"
leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}])"
subprocess.run([sys.executable, "-c", leave], stdout=subprocess.PIPE)
time.sleep(0.3)  # its end closed the pipe; now it may become a zombie
print(quiet.own_seconds() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
@pytest.mark.parametrize(("adopt", "counted"), [("adopt", True), ("not", False)])
def test_the_time_of_a_grandchild_that_its_parent_left_is_counted(adopt: str, counted: bool) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN, adopt], capture_output=True, text=True, check=True)
    assert (float(done.stdout) >= 0.5) == counted
