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

import torch

OPS: dict[str, str] = {
    "embedding": "embedding.embedding",
    "linear": "linear.linear",
    "pad_rows": "linear.pad_rows",
    "stack": "stack.stack",
    "moe": "moe.moe",
    "rms_norm": "norm.rms_norm",
    "layer_norm": "norm.layer_norm",
    "rope": "rope.rope",
    "write_kv": "place.write_kv",
    "gated_activation": "activation.gated_activation",
    "softcap": "activation.softcap",
    "new_cache": "cache.new_cache",
    "plan_attention": "attention_plan.plan",
    "attention": "attention.attention",
    "draw_on_device": "sampling.draw",
    "edit": "edits.edit",
    "forbid": "edits.forbid",
    "tell_on_device": "sampling.told",
}
"""op -> file.function"""

PRECISE = {"linear": "linear.prepare_precise"}
"""The op's weights where products are to be those of float32: the same kernels, in float32, see `tuning.of_weight`"""

PREPARE: dict[str, str] = {
    "embedding": "layout.prepare",
    "linear": "linear.prepare_linear",
}
"""op on weights -> what brings a `QuantTensor` into the form that it takes (`layout.Planes`)"""


DEVICES = ("cuda", "xpu")  # PyTorch calls AMD's devices cuda too
LEAST_CAPABILITY = (8, 0)  # of NVIDIA's: for 7.5 Triton 3.8 aborts on some of the kernels


def objection(device: torch.device) -> str:
    """Why the kernels cannot serve a device; "" when they can. A CPU is served by Triton's interpreter, for tests."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        interpreted = importlib.import_module("triton").knobs.runtime.interpret
        return "" if interpreted else "Triton has no kernels for cpu (TRITON_INTERPRET=1 interprets them, for tests)"
    if device.type not in DEVICES:
        return f"Triton has no kernels for {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    return ""


def load(op: str, table: dict[str, str] = OPS) -> Callable[..., Any]:
    """The implementation of an op. Imports Triton."""
    file, function = table[op].split(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{file}"), function)
    return found
