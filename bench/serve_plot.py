"""A report of `bench.serve` as a picture: tokens/s and time to the first token by users and by rate. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = (
    ("tokens_per_s", False, "short chats: tokens/s of all", "users"),
    ("ttft_p99_ms", False, "short chats: first token, p99, ms", "users"),
    ("ttft_p50_ms", True, "open loop: first token, p50, ms", "chats a second"),
)


def draw(report: Mapping[str, Any], target: Path) -> str:
    """Writes the PNG; returns what to tell about it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return 'no picture: matplotlib is missing (pip install "ollamapy[bench]")'
    models = report["models"]
    figure, panels = pyplot.subplots(len(models), len(PANELS), figsize=(15, 4 * len(models)), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for panel, (figure_name, is_open, title, axis) in zip(row, PANELS, strict=True):
            for server, points in lines(model["rounds"], figure_name, is_open).items():
                panel.plot(list(points), list(points.values()), marker="o", label=server)
            panel.set_title(f"{model['file']}, {title}", fontsize=10)
            panel.set_xlabel(axis, fontsize=8)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=8)
    machine = report["machine"]
    figure.suptitle(f"{machine['cpu']}, {report['threads']} threads, commit {machine['commit']}")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return f"drew {target}"


def lines(rounds: list[dict[str, Any]], figure: str, is_open: bool) -> dict[str, dict[float, float]]:
    """Server -> level -> median over the turns, of the rounds with short chats."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rounds:
        if row["workload"] == "short" and row["open"] == is_open:
            found.setdefault(row["server"], {}).setdefault(row["level"], []).append(row[figure])
    middle = {
        server: {level: statistics.median(values) for level, values in points.items()} for server, points in found.items()
    }
    return {server: dict(sorted(points.items())) for server, points in middle.items()}
