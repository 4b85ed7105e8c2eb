"""Triton kernels, one file per family. Installed as `ollamapy.triton_kernels`; imported by `ollamapy.ops` alone.

`OPS` says where the implementation of each op of `ollamapy.ops` is; `load` imports it. Nothing here imports Triton before
that: most machines have none. Signatures are those of `ollamapy.reference`, with weights and caches in our layouts:
`PREPARE` makes weights, `new_cache` makes caches.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

OPS: dict[str, str] = {
    "embedding": "embedding.embedding",
    "linear": "matmul.linear",
    "moe": "moe.moe",
    "rms_norm": "norm.rms_norm",
    "layer_norm": "norm.layer_norm",
    "add_rms_norm": "norm.add_rms_norm",
    "rope": "rope.rope",
    "write_kv": "rope.write_kv",
    "rope_write_kv": "rope.rope_write_kv",
    "gated_activation": "activation.gated_activation",
    "softcap": "activation.softcap",
    "new_cache": "attention.new_cache",
    "plan_attention": "attention.plan",
    "attention": "attention.attention",
}
"""op -> file.function"""

PREPARE: dict[str, str] = {
    "embedding": "embedding.prepare_embedding",
    "linear": "matmul.prepare_linear",
    "moe": "matmul.prepare_linear",
}
"""op on weights -> what brings a `QuantTensor` into the form that it takes (`layout.Planes`)"""


def objection(device_type: str) -> str:
    """Why the kernels cannot serve a device; "" when they can."""
    if device_type not in ("cuda", "xpu"):  # PyTorch calls AMD's devices cuda too
        return f"Triton has no kernels for {device_type}"
    return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def load(op: str, table: dict[str, str] = OPS) -> Callable[..., Any]:
    """The implementation of an op. Imports Triton."""
    file, function = table[op].split(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{file}"), function)
    return found
