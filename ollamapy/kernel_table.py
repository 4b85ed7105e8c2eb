"""Which kernels there are: one row for each op and implementation, with what it needs. `ops` chooses among them.

`TABLE` is ordered, best first. Adding a kernel is adding a row. The Triton rows are made of the tables of `triton_kernels`;
its files, and Triton, are imported when an op of theirs is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import ollamapy.triton_kernels as triton_kernels
from ollamapy import cpu_kernels, cpu_sampling, cuda_extension, cuda_kernels, extension, reference
from ollamapy.gguf.types import TYPES
from ollamapy.kernel import Kernel, Place
from ollamapy.quant.dequant import DEQUANT
from ollamapy.quant.tensor import QuantTensor
from ollamapy.reference import attention as paged_attention
from ollamapy.reference import device_sampling, sampling

FAMILIES = ("csrc", "triton", "reference")


def _anywhere(place: Place) -> str:
    return ""


def _decodable(place: Place) -> str:
    return "" if place.type in DEQUANT else f"no decoder for {TYPES[place.type].name if place.type is not None else 'it'}"


def _on_cpu(place: Place) -> str:
    if place.device.type != "cpu":
        return f"not built for {place.device.type}"
    return "" if extension.load() is not None else f"the extension is {extension.status()}"


def _heads_fit(place: Place) -> str:
    least, most = cpu_kernels.HEAD_LENGTHS
    odd = [length for length in place.head_lengths if not least <= length <= most]
    return _on_cpu(place) or (f"head length {odd[0]} is not between {least} and {most}" if odd else "")


def _reads_rows(place: Place) -> str:
    return _on_cpu(place) or ("" if place.type in cpu_kernels.PACKED else "no decoder for this tensor type")


def _packable(place: Place) -> str:
    return _on_cpu(place) or _decodable(place)


def _on_cuda(place: Place) -> str:
    if place.device.type != "cuda" or torch.version.hip is not None:
        return "CUDA kernels are for NVIDIA's GPUs"
    return "" if cuda_extension.load() is not None else f"the CUDA library is {cuda_extension.status()}"


def _cuda_multiplies(place: Place) -> str:
    return _on_cuda(place) or (cuda_kernels.objection(place.type) if place.type is not None else "")


def _late(op: str, table: dict[str, str]) -> Callable[..., Any]:
    """A function of `triton_kernels`, imported when it is first called."""
    found = cache(lambda: triton_kernels.load(op, table))
    return lambda *args, **kwargs: found()(*args, **kwargs)


def _on_triton(place: Place) -> str:
    reason: str = triton_kernels.objection(place.device)
    return reason


def _csrc(
    op: str,
    fn: Callable[..., Any],
    needs: Callable[[Place], str] = _on_cpu,
    prepare: Callable[[QuantTensor, torch.device], Any] | None = None,
    rows: Kernel | None = None,
    precise: bool | None = None,
) -> Kernel:
    return Kernel(op, "csrc", fn, needs, prepare, rows, ("cpu",), precise)


def _cuda(
    op: str,
    fn: Callable[..., Any],
    needs: Callable[[Place], str],
    prepare: Callable[[QuantTensor, torch.device], Any] | None = None,
) -> Kernel:
    rows = _triton("embedding") if op == "linear" else None  # its planes are Triton's
    return Kernel(op, "csrc", fn, needs, prepare, rows, ("cuda",), precise=False)


def _triton(op: str, precise: bool = False) -> Kernel:
    table = triton_kernels.PRECISE if precise else triton_kernels.PREPARE
    prepare = _late(op, table) if op in table else None
    rows = _triton("embedding") if op == "linear" else None  # both pack alike
    serves = precise if op in triton_kernels.PRECISE else None  # others serve both wishes, or do as the weights that they get
    return Kernel(op, "triton", _late(op, triton_kernels.OPS), _on_triton, prepare, rows, triton_kernels.DEVICES, serves)


_TILE_ROWS = Kernel("embedding", "csrc", cpu_kernels.embedding, _reads_rows)

TABLE: tuple[Kernel, ...] = (
    _csrc("embedding", cpu_kernels.embedding_rows, _reads_rows, reference.prepare_embedding),
    _csrc("linear", cpu_kernels.linear, _packable, cpu_kernels.prepare_linear, _TILE_ROWS, precise=False),
    _csrc("linear", cpu_kernels.linear, _packable, cpu_kernels.prepare_precise, _TILE_ROWS, precise=True),
    _csrc("moe", cpu_kernels.moe),
    _csrc("pad_rows", cpu_kernels.pad_rows),
    _csrc("rms_norm", cpu_kernels.rms_norm),
    _csrc("stack", cpu_kernels.stack, _heads_fit),
    _csrc("new_cache", cpu_kernels.new_cache, _heads_fit),
    _csrc("write_kv", cpu_kernels.write_kv, _heads_fit),
    _csrc("plan_attention", cpu_kernels.plan_attention, _heads_fit),
    _csrc("attention", cpu_kernels.attention, _heads_fit),
    _csrc("largest", cpu_sampling.largest),
    _csrc("log_totals", cpu_sampling.log_totals),
    _csrc("forbid", cpu_sampling.forbid),
    _csrc("draw", cpu_sampling.draw),
    _cuda("linear", cuda_kernels.linear, _cuda_multiplies, _late("embedding", triton_kernels.PREPARE)),
    _cuda("stack", cuda_kernels.stack, _on_cuda),
    *map(_triton, triton_kernels.OPS),
    *(_triton(op, precise=True) for op in triton_kernels.PRECISE),
    Kernel("embedding", "reference", reference.embedding, _decodable, reference.prepare_embedding),
    Kernel("linear", "reference", reference.linear, _decodable, reference.prepare_linear),
    Kernel("moe", "reference", reference.moe, _anywhere),
    Kernel("pad_rows", "reference", reference.pad_rows, _anywhere),
    Kernel("rms_norm", "reference", reference.rms_norm, _anywhere),
    Kernel("layer_norm", "reference", reference.layer_norm, _anywhere),
    Kernel("rope", "reference", reference.rope, _anywhere),
    Kernel("gated_activation", "reference", reference.gated_activation, _anywhere),
    Kernel("softcap", "reference", reference.softcap, _anywhere),
    Kernel("stack", "reference", lambda layers: "", _anywhere),
    Kernel("new_cache", "reference", reference.new_cache, _anywhere),
    Kernel("write_kv", "reference", reference.write_kv, _anywhere),
    Kernel("plan_attention", "reference", paged_attention.plan, _anywhere),
    Kernel("attention", "reference", paged_attention.attention, _anywhere),
    Kernel("largest", "reference", sampling.largest, _anywhere),
    Kernel("log_totals", "reference", sampling.log_totals, _anywhere),
    Kernel("edit", "reference", sampling.edit, _anywhere),
    Kernel("forbid", "reference", sampling.forbid, _anywhere),
    Kernel("draw", "reference", sampling.draw, _anywhere),
    Kernel("draw_on_device", "reference", device_sampling.draw, _anywhere),
    Kernel("tell_on_device", "reference", device_sampling.told, _anywhere),
)


def kernels_for(op: str) -> list[Kernel]:
    """The candidates of an op, best first."""
    return [kernel for kernel in TABLE if kernel.op == op]
