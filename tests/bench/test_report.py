"""Figures, tables and the reading of peers' outputs, on made-up figures. Nothing here is timed."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cpu, figures, llama_cpp, plot, starts, table, vllm
from bench.figures import Work
from bench.quiet import Quiet

REPORT: dict[str, Any] = {
    "machine": {"cpu": "Some CPU", "isa": "avx512bf16", "torch": "2.13.0", "commit": "abc", "load_average": 0.1},
    "threads": 2,
    "limits": {"read_gbs": 40.0, "vnni_gmacs": 1000.0},
    "columns": ["prefill512", "decode1", "decode4"],
    "models": [
        {
            "name": "m",
            "kernels": "csrc",
            "decode_bytes": 100_000_000,
            "prefill_macs": 100_000_000,
            "kl": {"ollamapy": 0.002, "llama.cpp": 0.003},
            "starts": {"ollamapy": {"first_token_s": 1.254, "memory_bytes": 130_400_000}},
            "engines": {
                "ollamapy": {"prefill512": [3000.0, 2900.0, 3100.0], "decode1": [200.0], "decode4": [600.0, 500.0]},
                "llama.cpp": {"prefill512": [1000.0], "decode1": [100.0]},
            },
        }
    ],
}


ENDS = ("of read", "of VNNI", "mean KL", "start s", "MB")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_two_engines() -> None:
    lines = table.render(REPORT).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    header, _, ours, theirs, ratios = lines[start:]
    assert cells(header) == ["model", "engine", "prefill512", "decode1", "decode4", *ENDS]
    assert cells(ours) == ["m", "ollamapy", "3000 ±3%", "200", "550 ±9%", "50%", "30%", "2.0e-03", "1.25", "130"]
    assert cells(theirs) == ["", "llama.cpp", "1000", "100", "-", "25%", "10%", "3.0e-03", "-", "-"]
    assert cells(ratios) == ["", "ratio to llama.cpp", "3.00x", "2.00x", "-", *[""] * 5]
    assert len({len(line) for line in lines[start:]}) == 1


def test_table_says_when_the_kernels_were_not_there() -> None:
    slow = {**REPORT, "models": [{**REPORT["models"][0], "kernels": "reference"}], "limits": {}}
    text = table.render(slow)
    assert "without the C++ kernels: m (reference)" in text
    assert "limits:" not in text and "50%" not in text


def test_merge_median_spread() -> None:
    samples = figures.merge([{"a": [1.0, 3.0]}, {"a": [2.0], "b": [5.0]}])
    assert samples == {"a": [1.0, 3.0, 2.0], "b": [5.0]}
    assert figures.median(samples, "a") == 2.0 and figures.spread(samples, "a") == 1.0
    assert figures.median(samples, "c") is None and figures.spread(samples, "c") is None
    assert figures.ratio(3.0, 2.0) == 1.5 and figures.ratio(None, 2.0) is None and figures.ratio(1.0, None) is None


def test_columns_of_one_thread_are_their_own() -> None:
    assert Work(2, batches=(8,)).columns == ["prefill512", "decode1", "decode8"]
    assert Work(1, prefill=False, batches=()).columns == ["decode1 1thread"]


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_llama_cpp_figures_are_read(tmp_path: Path) -> None:
    rows = [{"n_prompt": 512, "n_gen": 0, "samples_ts": [476.0, 470.0]}, {"n_prompt": 0, "n_gen": 128, "samples_ts": [180.0]}]
    script(tmp_path / "llama-bench", f"cat <<'END'\n{json.dumps(rows)}\nEND\n")
    batches = "\n".join(json.dumps({"pl": size, "speed_tg": 100.0 + size}) for size in (4, 8))
    script(tmp_path / "llama-batched-bench", f"echo noise\ncat <<'END'\n{batches}\nEND\n")
    found = llama_cpp.measure(tmp_path, Path("m.gguf"), Work(2, repeats=2, batches=(4, 8)))
    assert found == {
        "prefill512": [476.0, 470.0],
        "decode1": [180.0],
        "decode4": [104.0] * llama_cpp.BATCHED_RUNS,
        "decode8": [108.0] * llama_cpp.BATCHED_RUNS,
    }


def test_llama_cpp_failures_are_told(tmp_path: Path) -> None:
    with pytest.raises(llama_cpp.PeerError, match=r"llama-bench: No such file"):
        llama_cpp.measure(tmp_path, Path("m.gguf"), Work(1))
    script(tmp_path / "llama-bench", "echo 'cannot read m.gguf' >&2; exit 3")
    with pytest.raises(llama_cpp.PeerError, match=r"ended with 3: cannot read m\.gguf"):
        llama_cpp.measure(tmp_path, Path("m.gguf"), Work(1))


def test_a_peer_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script(tmp_path / "llama-bench", f"echo called >> {calls}; echo 'cannot read m.gguf' >&2; exit 3")
    monkeypatch.setenv("LLAMA_CPP_BIN", str(tmp_path))
    monkeypatch.delenv("VLLM", raising=False)
    said: list[str] = []
    sitting = cpu.Sitting("m", Path("m.gguf"), 1, Quiet(0.0), said.append)
    for _ in range(2):
        sitting.turn(llama_cpp.NAME, [Work(1, batches=())])
    sitting.turn(vllm.NAME, [Work(1)])
    assert said[-1] == "  m: vLLM bf16 is not here"
    problem = "llama-bench ended with 3: cannot read m.gguf"
    assert calls.read_text() == "called\n" and any(problem in line for line in said)
    sitting.quiet.others.append(0.0)
    row = sitting.row()
    assert row["failures"] == {"llama.cpp": problem} and row["engines"]["llama.cpp"] == {}
    report = {**REPORT, "models": [{**REPORT["models"][0], **row}]}
    assert f"m, llama.cpp failed: {problem}" in table.render(report).splitlines()
    assert plot.draw(report, tmp_path / "x.png")


def test_memory_counts_children(tmp_path: Path) -> None:
    """A child's own 50 MB are in, and pages shared with it not twice."""
    code = "import os, sys; data = os.fork() or b'x' * 50_000_000; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        assert [process.stdout.readline() for _ in range(2)] == [b"1\n"] * 2
        found = starts.memory(process.pid)
        process.stdin.close()
    assert 50_000_000 < found < 90_000_000


def test_plot_is_drawn_or_says_what_is_missing(tmp_path: Path) -> None:
    said = plot.draw(REPORT, tmp_path / "x.png")
    drawn = (tmp_path / "x.png").exists()
    assert drawn == said.startswith("drew")
    assert drawn or "ollamapy[bench]" in said


def test_vllm_that_does_not_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    script(tmp_path / "vllm", "echo 'no such option' >&2; exit 4")
    monkeypatch.delenv("LLAMA_CPP_BIN", raising=False)
    monkeypatch.setenv("VLLM", str(tmp_path / "vllm"))
    monkeypatch.setenv("VLLM_MODELS", f"smollm2={tmp_path}")
    sitting = cpu.Sitting("smollm2", smollm2_path, 2, Quiet(0.0), lambda text: None)
    sitting.turn(vllm.NAME, [Work(2), Work(1)])
    assert "no such option" in sitting.failures[vllm.NAME]
    monkeypatch.setenv("VLLM", str(tmp_path / "none"))
    with pytest.raises(llama_cpp.PeerError, match="none: No such file"):
        cpu.peers_of("smollm2", smollm2_path, 2)[vllm.NAME]([Work(2)])


def test_vllm_that_is_not_there_is_told() -> None:
    with pytest.raises(llama_cpp.PeerError, match=r"http://127\.0\.0\.1:1: "):
        vllm.measure("http://127.0.0.1:1", Work(2))
