"""The table of a report (the JSON that `bench.cpu` saves) as text. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import figures

NONE = "-"
LIMITS = (("read_gbs", "reads", 1, "GB/s"), ("vnni_gmacs", "int8 dots", 0, "GMAC/s"))


def render(report: Mapping[str, Any]) -> str:
    """Header lines, then for each model a row of each engine and one of ratios."""
    columns = report["columns"]
    header = ["model", "engine", *columns, "of read", "of VNNI", "mean KL", "start s", "MB"]
    rows: list[list[str]] = []
    for model in report["models"]:
        rows += _model_rows(model, columns, report["limits"])
    return "\n".join([*_preface(report), "", *align([header, *rows])])


def _preface(report: Mapping[str, Any]) -> list[str]:
    machine, limits = report["machine"], report["limits"]
    lines = [
        f"{machine['cpu']}, {report['threads']} threads, {machine['isa'] or 'no kernels'}, torch {machine['torch']}, "
        f"commit {machine['commit']}, load average {machine['load_average']}",
        "tokens/s, medians; ± is half the spread of all samples, where there are several",
        "start: of an engine to its first token, the file being in the page cache; MB: of memory it holds then",
    ]
    for model in report["models"]:
        lines += [f"{model['name']}, {engine} failed: {problem}" for engine, problem in model.get("failures", {}).items()]
    slow = [f"{model['name']} ({model['kernels']})" for model in report["models"] if model["kernels"] != "csrc"]
    if slow:
        lines.append(f"without the C++ kernels: {', '.join(slow)}")
    known = [f"{title} {limits[key]:.{digits}f} {unit}" for key, title, digits, unit in LIMITS if key in limits]
    if known:
        lines.append(f"limits: {', '.join(known)}")
    return lines


def _model_rows(model: Mapping[str, Any], columns: Sequence[str], limits: Mapping[str, float]) -> list[list[str]]:
    rows = []
    engines: Mapping[str, Mapping[str, list[float]]] = model["engines"]
    for number, (engine, samples) in enumerate(engines.items()):
        decode, prefill = figures.median(samples, figures.SINGLE), figures.median(samples, figures.PREFILL)
        rows.append(
            [
                model["name"] if number == 0 else "",
                engine,
                *(_cell(samples, column) for column in columns),
                percent(figures.fraction_of_read(model, limits, decode)),
                percent(figures.fraction_of_dots(model, limits, prefill)),
                _kl(model.get("kl", {}).get(engine)),
                *_start(model.get("starts", {}).get(engine)),
            ]
        )
    ours = engines.get("ollamapy", {})
    for peer, samples in engines.items():
        if peer == "ollamapy":
            continue
        ratios = [figures.ratio(figures.median(ours, column), figures.median(samples, column)) for column in columns]
        rows.append(["", f"ratio to {peer}", *(NONE if each is None else f"{each:.2f}x" for each in ratios), *[""] * 5])
    return rows


def _cell(samples: Mapping[str, list[float]], column: str) -> str:
    middle, apart = figures.median(samples, column), figures.spread(samples, column)
    if middle is None or apart is None:
        return NONE
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f}" + f" ±{apart * 50:.0f}%" * (len(samples[column]) > 1)


def percent(fraction: float | None) -> str:
    return NONE if fraction is None else f"{fraction * 100:.0f}%"


def _start(found: Mapping[str, float] | None) -> tuple[str, str]:
    return (f"{found['first_token_s']:.2f}", f"{found['memory_bytes'] / 1e6:.0f}") if found else (NONE, NONE)


def _kl(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
