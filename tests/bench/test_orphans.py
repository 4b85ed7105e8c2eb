"""A bench that is ended by SIGTERM ends the servers that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from bench.machine import ROOT


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_servers_end_with_the_bench(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.server"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as bench:
        deadline = time.monotonic() + 30
        while len(below := psutil.Process(bench.pid).children(recursive=True)) < 3:  # the daemon, its forkserver, an engine
            assert time.monotonic() < deadline and bench.poll() is None
            time.sleep(0.01)
        bench.send_signal(how)
        assert bench.wait(30) != 0
    _, alive = psutil.wait_procs(below, 2)
    for process in alive:
        process.kill()
    assert not alive
