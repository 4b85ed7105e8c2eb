"""The steps of bench/gpu_check.sh, each in a process of its own with a time limit: one that fails does not stop the others.

Writes one JSON file under bench/results/ (machine, versions, commit, every figure, every error) and prints a short table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / "build" / "wheels"
CARRIED = ("msgspec", "pytest", "pytest-timeout", "gguf", "transformers")  # what the steps import beside torch, with its own
LIMITS = {"build": 100, "kernels": 110, "time": 95, "load": 40, "e2e": 105, "llama": 30}
"""Steps in order, and the seconds each may take. The whole may take their sum, 480: later steps get what is left of it."""


def said(*command: str) -> str:
    """What a command prints, "" when there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def version(package: str) -> str:
    return said(sys.executable, "-c", f"import importlib.metadata as m; print(m.version({package!r}))")


def facts(device: str) -> dict[str, Any]:
    query = "name,driver_version,memory.total,clocks.max.mem"
    return {
        "device": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") if device == "cuda" else "cpu",
        "nvcc": said("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "numpy")},
        "commit": said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def fetch_wheels(python: str) -> None:
    """For a machine without a network. torch, and what comes with it, is there."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", python]
    subprocess.run([*command, "-d", str(WHEELS), *CARRIED], check=True)
    for path in WHEELS.glob("numpy-*.whl"):
        path.unlink()
    print(f"{WHEELS}: {sum(path.stat().st_size for path in WHEELS.glob('*.whl')) >> 20} MiB")


def environment(device: str, site: Path) -> dict[str, str]:
    """Of the steps: with the carried wheels, unpacked in `site`, where there are any."""
    for path in WHEELS.glob("*.whl"):
        try:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(site)
        except (zipfile.BadZipFile, OSError) as problem:
            print(f"{path.name} is left out: {problem}")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(site)]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    made["HF_HUB_OFFLINE"] = "1"  # what would ask the network fails at once
    return made | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})


def end_session(leader: int) -> None:
    """Ends a process that leads a session and all in that session, whatever their process groups."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(path.read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # it has ended by itself
            continue


def run_step(step: str, device: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """What `bench.gpu_steps` found, with its seconds, and the end of its output when it failed."""
    if limit < 1:
        return {"seconds": 0.0, "error": "no time was left"}
    start, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [sys.executable, "-m", "bench.gpu_steps", step, "--device", device, "--out", str(out)]
        with log.open("w") as said_there:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said_there, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            if code := process.wait(limit):
                error = log.read_text()[-2000:] or f"exit status {code}"
        except subprocess.TimeoutExpired:
            error = f"not done within {limit:.0f} s; the last it said: {log.read_text()[-600:]}"
            end_session(process.pid)  # with the compilers and checks that it has started
            process.wait()
        figures = json.loads(out.read_text()) if out.exists() else {}
    return {"seconds": round(time.monotonic() - start, 1), **({"error": error} if error else {}), **figures}


def show(steps: dict[str, dict[str, Any]]) -> None:
    for step, found in steps.items():
        print(f"\n{step}: {found['seconds']} s{' FAILED' if 'error' in found else ''}")
        if "error" in found:
            print("  " + found["error"].strip().replace("\n", "\n  ")[-800:])
        for row in found.get("rows", []):
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
        for key, value in found.items():
            if key not in ("rows", "seconds", "error"):
                print(f"  {key}: {value}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default=",".join(LIMITS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fetch-wheels", metavar="PYTHON", help="only fetch what is to be carried, for this version of Python")
    args = parser.parse_args()
    if args.fetch_wheels:
        fetch_wheels(args.fetch_wheels)
        return 0
    chosen = args.steps.split(",")
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"unknown steps: {', '.join(sorted(unknown))} (known: {', '.join(LIMITS)})")
    end = time.monotonic() + sum(LIMITS.values())
    result: dict[str, Any] = {"machine": facts(args.device), "steps": {}}
    stamp = result["machine"]["time"].replace(":", "")
    out = args.out or ROOT / "bench" / "results" / f"gpu-{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as site:
        variables = environment(args.device, Path(site))
        for step in (step for step in LIMITS if step in chosen):
            result["steps"][step] = run_step(step, args.device, min(LIMITS[step], end - time.monotonic()), variables)
            out.write_text(json.dumps(result, indent=1) + "\n")  # also when a later step is stopped
    show(result["steps"])
    print(f"\n{out}")
    return int(any("error" in found for found in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
