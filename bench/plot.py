"""A report of `bench.cpu` as a picture: a panel per model, a bar per engine and column. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import figures

WIDTH = 0.8  # of all bars of a column, in steps of the axis


def draw(report: Mapping[str, Any], target: Path) -> str:
    """Writes the PNG; returns what to tell about it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return 'no picture: matplotlib is missing (pip install "ollamapy[bench]")'
    models = report["models"]
    figure, panels = pyplot.subplots(-(-len(models) // 2), 2, figsize=(14, 3.4 * -(-len(models) // 2)), squeeze=False)
    for panel in panels.flat[len(models) :]:
        panel.axis("off")
    for panel, model in zip(panels.flat, models, strict=False):
        _panel(panel, model, report["columns"])
    machine = report["machine"]
    figure.suptitle(f"tokens/s, {machine['cpu']}, {report['threads']} threads, commit {machine['commit']}")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return f"drew {target}"


def _panel(panel: Any, model: Mapping[str, Any], columns: list[str]) -> None:
    engines: Mapping[str, Mapping[str, list[float]]] = model["engines"]
    width = WIDTH / len(engines)
    for number, (engine, samples) in enumerate(engines.items()):
        heights = [figures.median(samples, column) or 0.0 for column in columns]
        lows = [height - min(samples.get(column, [0.0])) for height, column in zip(heights, columns, strict=True)]
        highs = [max(samples.get(column, [0.0])) - height for height, column in zip(heights, columns, strict=True)]
        places = [index + (number - (len(engines) - 1) / 2) * width for index in range(len(columns))]
        bars = panel.bar(places, heights, width, yerr=[lows, highs], capsize=2, label=engine)
        panel.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7, padding=2)
    panel.set_xticks(range(len(columns)), columns, fontsize=8)
    if any(height > 0 for samples in engines.values() for values in samples.values() for height in values):
        panel.set_yscale("log")
    panel.margins(y=0.15)
    panel.set_title(model["name"], fontsize=10)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)
