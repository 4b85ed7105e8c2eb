"""bench/gpu_check.sh from end to end, on the CPU: every step runs, and what it found is in the JSON."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_every_step_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", "--device", "cpu", "--out", out], capture_output=True, text=True, check=False
    )
    found = json.loads(out.read_text())
    assert list(found["steps"]) == ["build", "kernels", "time", "e2e", "llama"], done.stdout
    for step, figures in found["steps"].items():
        assert "error" not in figures, (step, figures)
        assert not [row for row in figures["rows"] if "failed" in row], step
    checks = {row["checks"]: row["passed"] for row in found["steps"]["kernels"]["rows"]}
    assert checks["cuda"] and checks["triton"]
    assert found["steps"]["e2e"]["rows"][-1]["tokens_per_second"] > 0
    assert found["machine"]["commit"] and "e2e" in done.stdout
