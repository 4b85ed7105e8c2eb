"""The tables of `list` and `ps`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ollamapy.api.types import ListResponse, RunningModel, RunningResponse
from ollamapy.cli.text import columns, go_duration, human_bytes, human_time, parse_time, table

ID_DIGITS = 12


def listing(found: ListResponse, prefix: str = "") -> str:
    """Models whose name begins with `prefix`, in whatever case."""
    now = datetime.now(UTC)
    rows = [
        (
            model.name,
            model.digest[:ID_DIGITS],
            "-" if model.remote_model else human_bytes(model.size),
            human_time(parse_time(model.modified_at), now),
        )
        for model in found.models
        if model.name.lower().startswith(prefix.lower())
    ]
    return table(("NAME", "ID", "SIZE", "MODIFIED"), rows)


def running(found: RunningResponse, prefix: str = "", *, verbose: bool = False) -> str:
    """Loaded models; with `verbose` the figures of their engines, where the server gives them."""
    models = [model for model in found.models if model.name.startswith(prefix)]
    lines = [table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), [_running_row(model) for model in models])]
    for model in models:
        if verbose and (model.notes or model.engine):
            lines += ["", f"  {model.name}", *_details(model)]
    return "\n".join(lines)


def processor(size: int, size_vram: int) -> str:
    if size_vram == 0:
        return "100% CPU"
    if size_vram == size:
        return "100% GPU"
    if size_vram > size:
        return "Unknown"
    cpu = int((size - size_vram) / size * 100 + 0.5)
    return f"{cpu}%/{100 - cpu}% CPU/GPU"


def _running_row(model: RunningModel) -> tuple[str, ...]:
    now, expires = datetime.now(UTC), parse_time(model.expires_at)
    return (
        model.name,
        model.digest[:ID_DIGITS],
        human_bytes(model.size),
        processor(model.size, model.size_vram),
        str(model.context_length),
        "Stopping..." if expires and expires < now else human_time(expires, now),
    )


def _details(model: RunningModel) -> list[str]:
    rows = [("note", note) for note in model.notes] + _flat(model.engine)
    stats = model.engine.get("stats", {})
    if asked := stats.get("prefix_query_tokens"):
        rows.append(("stats prefix hit rate", f"{stats['prefix_hit_tokens'] / asked:.0%}"))
    return [f"    {line}" for line in columns([(name.replace("_", " "), value) for name, value in rows])]


def _flat(values: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Name and text of each value, those of inner objects under "outer inner"; sizes and times in human form."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{above}{name} ")
        elif isinstance(value, list):
            rows.append((above + name, ", ".join(map(str, value))))
        elif name.endswith("bytes") and isinstance(value, int):
            rows.append((above + name.removesuffix("_bytes"), human_bytes(value)))
        elif name.endswith("_ns") and isinstance(value, int):
            rows.append((above + name.removesuffix("_ns"), go_duration(value)))
        elif name != "type":  # the message's, not the engine's
            rows.append((above + name, str(value)))
    return rows
