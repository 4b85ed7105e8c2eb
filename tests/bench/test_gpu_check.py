"""bench/gpu_check.sh on the CPU: every step runs, what it found is in the JSON, and carried wheels are imported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_engine, gpu_load, gpu_steps
from bench.make_model import SHAPES

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_engine_is_timed_with_graphs_and_without() -> None:
    rows: list[dict[str, Any]] = []
    gpu_engine.run(torch.device("cpu"), "csrc", lambda **cells: rows.append(cells))
    decoded = {(row["mode"], row["batch"]): row for row in rows if "batch" in row}
    assert set(decoded) == {(mode, batch) for mode in gpu_engine.MODES for batch in (1, 3)}
    assert all(row["tokens_per_second"] > 0 for row in decoded.values())
    assert all(row["same_answers"] == f"{batch} of {batch}" for (_, batch), row in decoded.items())
    recorded = {row["mode"]: row["recorded"] for row in rows if "recorded" in row}
    assert recorded["graphs"]["steps"] == "1 x 8, 4 x 8" and recorded["graphs"]["replayed"] > 8
    assert recorded["launches"]["state"].startswith("off")


def test_carried_wheels_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "found = 42")
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path / "wheels")
    variables = gpu_check.environment("cuda", tmp_path / "site")
    command = [sys.executable, "-c", "import carried_thing, ollamapy; print(carried_thing.found)"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n" and "TRITON_INTERPRET" not in variables


def test_a_step_that_does_not_end_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it runs on: also what it started in a group of its own."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "gpu_steps.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], process_group=0)\n"
        'pathlib.Path(sys.argv[-1]).write_text(\'{"rows": [{"child": %d}]}\' % child.pid)\n'
        "print('so far', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    found = gpu_check.run_step("time", "cpu", 2.0, dict(os.environ))
    assert "not done within 2 s" in found["error"] and "so far" in found["error"]
    status = Path(f"/proc/{found['rows'][0]['child']}/stat")
    deadline = time.monotonic() + 10  # killed it is, but it ends when it is scheduled next
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def checks(tmp_path: Path, **commands: list[str]) -> gpu_steps.Report:
    report = gpu_steps.Report(tmp_path / "found.json")
    gpu_steps.together(commands, dict(os.environ), dict.fromkeys(commands, 1.0), report)
    return report


def test_a_check_that_fails_fails_the_run(tmp_path: Path) -> None:
    """So does one that does not end; not one whose tool is not there. The rows are written all the same."""
    passes, fails = ([sys.executable, "-c", f"print(1); raise SystemExit({code})"] for code in (0, 1))
    checks(tmp_path, one=passes, sanitizer=["no-such-sanitizer"]).end()
    for failing, passed in ((fails, False), (["sleep", "60"], None)):
        report = checks(tmp_path, one=passes, two=failing)
        with pytest.raises(SystemExit, match=r"not done: two$"):
            report.end()
        rows = json.loads((tmp_path / "found.json").read_text())["rows"]
        assert [(row["checks"], row["passed"]) for row in rows] == [("one", True), ("two", passed)]
    report = gpu_steps.Report(tmp_path / "found.json")
    report.row(matvec="8B Q4_K", cuda_failed="RuntimeError: the launch failed")
    with pytest.raises(SystemExit, match="8B Q4_K"):
        report.end()


def test_a_tool_whose_time_is_up_has_not_finished(tmp_path: Path) -> None:
    """Neither passed nor failed, within its own bound; what another tool found fails the run all the same."""
    limits = {"racecheck": 2.0, "memcheck": 50.0}

    def told(ending: str) -> gpu_steps.Report:
        report = gpu_steps.Report(tmp_path / "found.json")
        runs = {"racecheck": ["sh", "-c", "echo so far; sleep 60"], "memcheck": ["sh", "-c", f"sleep 2.2; echo said; {ending}"]}
        gpu_steps.together(runs, dict(os.environ), limits, report, slow=True)
        return report

    report = told("exit 0")
    report.end()
    assert report.figures["rows"] == [
        {"checks": "racecheck", "passed": None, "not_finished": "not finished within 2 s: so far"},
        {"checks": "memcheck", "passed": True, "summary": "said"},
    ]
    with pytest.raises(SystemExit, match=r"not done: memcheck$"):
        told("exit 1").end()


def test_a_file_is_loaded_in_every_way(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    gpu_load.run(torch.device("cpu"), tmp_path / "t.gguf", SHAPES["tiny"], lambda **cells: rows.append(cells))
    assert {(row["load"], row["cold"]) for row in rows[1:] if row.get("gbs", 0) > 0} == {
        (way, cold) for way in ("read", "upload", "model", "model, triton") for cold in (False, True)
    }, rows


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
    assert list(found["steps"]) == ["build", "kernels", "time", "load", "e2e", "llama"], done.stdout
    for step, figures in found["steps"].items():
        assert "error" not in figures, (step, figures)
        assert not [row for row in figures["rows"] if "failed" in row], step
    checks = {row["checks"]: row["passed"] for row in found["steps"]["kernels"]["rows"]}
    assert checks["cuda"] and checks["triton"]
    assert [row["tokens_per_second"] for row in found["steps"]["e2e"]["rows"] if "batch" in row]
    assert found["machine"]["commit"] and "e2e" in done.stdout
