"""The text of `show`: blocks of facts on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ollamapy.api.types import ShowResponse
from ollamapy.cli.text import columns
from ollamapy.cli.wrap import display_width

_SHOWN_LINES = 2  # of a system message or licence
_LIST_WIDTH = 10  # columns that the elements of a list may take
Rows = list[tuple[str, ...]]


def summary(info: ShowResponse, *, verbose: bool = False) -> str:
    """All blocks; `verbose` adds the metadata and the tensors."""
    blocks = [
        _block("Model", _model(info)),
        _block("Capabilities", [(name,) for name in info.capabilities]),
        _block("Projector", _projector(info.projector_info)),
        _block("Parameters", [tuple(line.split(maxsplit=1)) for line in info.parameters.splitlines() if line.strip()]),
    ]
    if verbose:
        blocks.append(_block("Metadata", [(key, _value(info.model_info[key])) for key in sorted(info.model_info)]))
        blocks.append(_block("Tensors", [(t.name, t.type, f"[{' '.join(map(str, t.shape))}]") for t in info.tensors]))
    blocks += [_block("System", _head(info.system)), _block("License", _head(info.license))]
    return "".join(blocks)


def one(info: ShowResponse, what: str) -> str:
    """One part as it is: license, modelfile, parameters, system or template."""
    text: str = getattr(info, what)
    return text


def human_number(count: int) -> str:
    """A parameter count: 134.52M, 7.6B, 512."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            value = count / size
            if unit == "M":
                return f"{value:.2f}M"
            return f"{int(value)}{unit}" if value >= 10 or value.is_integer() or unit == "K" else f"{value:.1f}{unit}"
    return str(count)


def _block(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    return "\n".join([f"  {title}", *(f"    {line}" for line in columns(rows)), "", ""])


def _model(info: ShowResponse) -> Rows:
    rows: Rows = []
    if info.remote_host:
        rows += [("Remote model", info.remote_model), ("Remote URL", info.remote_host)]
    arch = str(info.model_info.get("general.architecture") or info.details.family)
    count = info.model_info.get("general.parameter_count")
    parameters = info.details.parameter_size or (human_number(int(count)) if count else "")
    facts = {
        "architecture": arch,
        "parameters": parameters,
        "context length": info.model_info.get(f"{arch}.context_length"),
        "embedding length": info.model_info.get(f"{arch}.embedding_length"),
        "quantization": info.details.quantization_level,
        "requires": info.requires,
    }
    return rows + [(name, _value(value)) for name, value in facts.items() if value]


def _projector(metadata: dict[str, Any]) -> Rows:
    arch = metadata.get("general.architecture", "")
    count = metadata.get("general.parameter_count")

    def of_tower(key: str) -> Any:
        return metadata.get(f"{arch}.vision.{key}", metadata.get(f"{arch}.audio.{key}"))

    facts = {
        "architecture": arch,
        "parameters": human_number(int(count)) if count else "",
        "embedding length": of_tower("embedding_length"),
        "dimensions": of_tower("projection_dim"),
    }
    return [(name, _value(value)) for name, value in facts.items() if value]


def _head(text: str) -> Rows:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line,) for line in (*lines[:_SHOWN_LINES], *(["..."] if len(lines) > _SHOWN_LINES else []))]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return _list(value)
    return str(value)


def _list(values: list[Any]) -> str:
    """[a b c], or as many as fit and how many more there are."""
    shown, width = 0, 1
    for at, value in enumerate(values):
        width += display_width(_value(value)) + (2 if at else 0)
        if width > _LIST_WIDTH and at:
            break
        shown += 1
    text = " ".join(_value(value) for value in values[:shown])
    return f"[{text} ...+{len(values) - shown} more]" if shown < len(values) else f"[{text}]"
