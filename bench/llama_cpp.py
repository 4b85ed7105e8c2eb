"""llama.cpp's own measuring tools on a file: llama-bench and llama-batched-bench of a folder that the user names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.figures import BATCH_DECODE, BATCH_PROMPT, DECODE, PREFILL, PROMPT, Samples, Work, batch_column

NAME = "llama.cpp"
BATCHED_RUNS = 1  # of llama-batched-bench in a turn: each prefills every batch anew, 10 to 30 s


class PeerError(Exception):
    """A tool that is not there or does not take the file; the text says what it printed last."""


def measure(folder: Path, model: Path, work: Work) -> Samples:
    """Tokens/s of each column; 512 tokens are one ubatch, as one step of ours."""
    samples: Samples = {}
    if work.prefill or work.single:
        prompt, generated = PROMPT * work.prefill, DECODE * work.single
        for row in bench(folder, model, work, prompt, generated):
            samples[PREFILL if row["n_prompt"] else work.single_column] = row["samples_ts"]
    for _ in range(BATCHED_RUNS if work.batches else 0):
        for row in batched_bench(folder, model, work):
            samples.setdefault(batch_column(row["pl"]), []).append(row["speed_tg"])
    return samples


def bench(folder: Path, model: Path, work: Work, prompt: int, generated: int) -> list[dict[str, Any]]:
    arguments = ["-p", prompt, "-n", generated, "-r", work.repeats, "-t", work.threads, "-ngl", 0, "-fa", "on", "-o", "json"]
    rows: list[dict[str, Any]] = json.loads(_run(folder / "llama-bench", model, arguments))
    return rows


def batched_bench(folder: Path, model: Path, work: Work) -> list[dict[str, Any]]:
    context = max(work.batches) * (BATCH_PROMPT + BATCH_DECODE)
    sizes = ",".join(map(str, work.batches))
    shape = ["-npp", BATCH_PROMPT, "-ntg", BATCH_DECODE, "-npl", sizes, "-c", context]
    team = ["-t", work.threads, "-tb", work.threads, "-ngl", 0, "-fa", "on", "--output-format", "jsonl"]
    lines = _run(folder / "llama-batched-bench", model, [*shape, *team]).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def _run(tool: Path, model: Path, arguments: list[object]) -> str:
    command = [str(tool), "-m", str(model), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as problem:
        raise PeerError(f"{tool}: {problem.strerror}") from None
    if done.returncode:
        raise PeerError(f"{tool.name} ended with {done.returncode}: {' / '.join(done.stderr.splitlines()[-3:])}")
    return done.stdout
