"""THE dispatch place: op -> implementation, by declared capability. Layers call `ops.*`; nothing else imports a kernel.

`TABLE` (`kernel_table.py`) is ordered, best first. `choose` resolves it once for a device: the first row whose `needs` has no
objection serves the op. Ops on weights are resolved once per weight, at load, by `prepare`: a kernel may take some quantization
types only. A row for the device that is passed over is logged once, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy import cpu_kernels, extension, reference
from ollamapy.cpu_kernels import DecoderLayer as DecoderLayer
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.engine.edits import Edits
from ollamapy.engine.filters import Floats, Ids
from ollamapy.engine.protocol import SamplingParams
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.types import GGMLType
from ollamapy.kernel import Kernel as Kernel
from ollamapy.kernel import Place as Place
from ollamapy.kernel import Weight as Weight
from ollamapy.kernel_table import FAMILIES, TABLE
from ollamapy.kernel_table import kernels_for as kernels_for
from ollamapy.quant.tensor import QuantTensor
from ollamapy.reference import Activation as Activation
from ollamapy.reference import Routing as Routing

log = logging.getLogger(__name__)

Use = Literal["linear", "embedding", "dense"]

_WEIGHT_OPS = {kernel.op for kernel in TABLE if kernel.prepare is not None}


def stack(layers: Sequence[DecoderLayer]) -> Any | None:
    """One call for all decoder layers, where the kernels in force have that and every layer fits it; else None."""
    made = _choice.fn["stack"](layers)
    if not isinstance(made, str):
        return made
    if made:
        log.info("layers run op by op (%s)", made)
    return None


@dataclass(slots=True)
class Resolved:
    """The kernels in force on one type of device."""

    fn: dict[str, Callable[..., Any]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


class Choice:
    """The kernels in force in this process. One model runs in one process, so there is one; its layers may lie on several
    devices, and `fn` is of the device whose turn it is."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.family, self.precise = "", False
        self.resolved: dict[str, Resolved] = {}
        self.fn: dict[str, Callable[..., Any]] = {}
        self._logged: set[tuple[str, str]] = set()

    def resolve(self, device: torch.device, family: str, head_lengths: tuple[int, ...], precise: bool) -> None:
        if family and family not in FAMILIES:
            raise UnsupportedModel(f'unknown kernel family "{family}" (known: {", ".join(FAMILIES)})')
        self.family, self.precise = family, precise
        found = Resolved()
        for op in {kernel.op for kernel in TABLE} - _WEIGHT_OPS:
            kernel = self.pick(op, Place(device, head_lengths=head_lengths))
            found.fn[op] = kernel.fn
            found.chosen[op] = kernel.family
        self.resolved[device.type] = found
        self.switch(device)

    def switch(self, device: torch.device) -> None:
        self.device, self.fn = device, self.resolved[device.type].fn
        if device.index is not None and device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.set_device_index(device.index)  # of this thread: there Triton launches, wherever tensors are

    def pick(self, op: str, place: Place) -> Kernel:
        """The first candidate that can serve. A forced family goes first, not alone: it need not have every op."""
        wanted = [kernel for kernel in kernels_for(op) if kernel.precise in (None, self.precise)]
        candidates = sorted(wanted, key=lambda kernel: bool(self.family) and kernel.family != self.family)
        refused: list[str] = []
        for kernel in candidates:
            if kernel.devices and place.device.type not in kernel.devices and kernel.family != self.family:
                continue
            reason = kernel.needs(place)
            if not reason:
                self._log(op, kernel, refused)
                return kernel
            refused.append(f"{kernel.family}: {reason}")
        raise UnsupportedModel(f"no kernel for {op} on {place.device} ({'; '.join(refused)})")

    def note(self, use: Use, kernel: Kernel, device: torch.device) -> None:
        """A weight was prepared for an op on weights."""
        chosen = self.resolved[device.type].chosen
        names = chosen[use].split(", ") if use in chosen else []
        chosen[use] = ", ".join(dict.fromkeys([*names, kernel.family]))

    def _log(self, op: str, kernel: Kernel, refused: list[str]) -> None:
        reason = "; ".join(refused)
        if refused and (op, reason) not in self._logged:
            self._logged.add((op, reason))
            log.warning("%s runs on the %s kernel (%s)", op, kernel.family, reason)


_choice = Choice()


def choose(device: torch.device, family: str = "", head_lengths: tuple[int, ...] = (), *, precise: bool = False) -> None:
    """Resolves the table for a device and a model's head lengths; `family` is `Settings.kernels`, `precise` rules out kernels
    that round activations. Weights that were prepared earlier keep their kernels."""
    _choice.resolve(device, family, head_lengths, precise)


def switch(device: torch.device) -> None:
    """From now on ops run on `device`, for whose type `choose` was called before. `choose` does so too."""
    _choice.switch(device)


def set_threads(count: int, *, loading: bool = False) -> None:
    """Threads of the CPU's kernels in force, the calling one included. Beside the C++ kernels torch's own operators keep to one
    thread, or two teams would fight for the cores; not in a load, where the two take turns."""
    compiled = _compiled()
    if compiled:
        cpu_kernels.set_threads(count)
    torch.set_num_threads(1 if compiled and not loading else count)


def cpu_isa() -> str:
    """The instruction set of the C++ kernels, where the device whose turn it is is the CPU and some of them serve; else ""."""
    return extension.isa() if _choice.device.type == "cpu" and _compiled() else ""


def _compiled() -> bool:
    return "csrc" in _choice.resolved["cpu"].chosen.values()


def chosen() -> dict[str, str]:
    """op -> implementation in force on this device; of ops on weights, those of the weights prepared since `choose`."""
    return dict(sorted(_choice.resolved[_choice.device.type].chosen.items()))


def prepare(weight: QuantTensor, device: torch.device, use: Use) -> Weight | Tensor:
    """The load-time form of a tensor: a Weight for `linear`, `moe` (3-D) and `embedding`, a float32 Tensor for "dense"."""
    if use == "dense":
        return reference.prepare_linear(weight, device)
    kernel = _choice.pick(use, Place(device, weight.type))
    assert kernel.prepare is not None
    _choice.note(use, kernel, device)
    return Weight(kernel.prepare(weight, device), kernel, weight.shape)


def embedding_of(head: Weight, type: GGMLType) -> Weight | None:
    """A matrix of `type` that `linear` has prepared, for `embedding`: one copy for both. None where the kernel cannot."""
    rows = head.kernel.rows
    if rows is None or rows.needs(Place(_choice.device, type)):
        return None
    _choice.note("embedding", rows, _choice.device)
    return Weight(head.data, rows, head.shape)


def embedding(token_ids: Tensor, weight: Weight) -> Tensor:
    """(n,) int64 -> (n, E) float32."""
    out: Tensor = weight.kernel.fn(token_ids, weight.data)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N). A row's result does not depend on the other rows."""
    out: Tensor = weight.kernel.fn(x, weight.data, bias)
    return out


def moe(x: Tensor, logits: Tensor, experts: tuple[Weight, Weight, Weight], routing: Routing, kind: Activation) -> Tensor:
    """Routed gated experts, (n, E) -> (n, E): see `reference.moe`. `experts` are gate, up (X, F, E) and down (X, E, F)."""
    gate, up, down = experts
    out: Tensor = _choice.fn["moe"](x, logits, (gate.data, up.data, down.data), routing, kind)
    return out


def pad_rows(x: Tensor) -> Tensor:
    """x with rows of zeros up to the multiple that the linear kernel wants; other ops leave rows beyond the batch's alone."""
    out: Tensor = _choice.fn["pad_rows"](x)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    out: Tensor = _choice.fn["rms_norm"](x, weight, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    out: Tensor = _choice.fn["layer_norm"](x, weight, bias, eps)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotary embedding of q and k (n, heads, D), in place; cos and sin (n, 1, n_rot) as in `reference.rope`."""
    _choice.fn["rope"](q, k, cos, sin, interleaved)


def gated_activation(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """act(gate) * up; may reuse gate's memory."""
    out: Tensor = _choice.fn["gated_activation"](gate, up, kind)
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    out: Tensor = _choice.fn["softcap"](x, cap)
    return out


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Keys and values of the batch's rows to their slots, in the cache's type."""
    _choice.fn["write_kv"](k, v, cache, slot_mapping)


def new_cache(state: LayerState, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """A layer's paged cache, zeroed, in the layout of the kernels that will write and read it. uint8 stands for q8_0."""
    out: KVCache = _choice.fn["new_cache"](state, num_blocks, block_size, dtype, device)
    return out


def plan_attention(batch: Batch, cache: KVCache) -> Any:
    """What `attention` wants to know about a batch, made once per forward pass."""
    return _choice.fn["plan_attention"](batch, cache)


def attention(
    q: Tensor,
    cache: KVCache,
    plan: Any,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Paged attention, (n, H, D) -> (n, H * Dv): see `reference.attention.attention`."""
    out: Tensor = _choice.fn["attention"](q, cache, plan, scale=scale, window=window, cap=cap, sinks=sinks, causal=causal)
    return out


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], Ids]:
    """The likeliest tokens: see `reference.sampling.largest`."""
    out: tuple[NDArray[np.float32], Ids] = _choice.fn["largest"](logits, count)
    return out


def log_totals(logits: Tensor) -> Floats:
    """(n, V) -> (n,): see `reference.sampling.log_totals`."""
    out: Floats = _choice.fn["log_totals"](logits)
    return out


def edit(logits: Tensor, edits: Edits) -> None:
    """Changes single logits (n, V) float32, in place: biases, penalties, ids never chosen; see `engine.edits.Edits`."""
    _choice.fn["edit"](logits, edits)


def forbid(logits: Tensor, rows: Sequence[int], bits: NDArray[np.int32]) -> None:
    """Minus infinity for the tokens of rows whose bits are 0, in place: see `reference.sampling.forbid`."""
    _choice.fn["forbid"](logits, rows, bits)


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> tuple[Ids, Floats]:
    """One token of each row: see `reference.sampling.draw`."""
    out: tuple[Ids, Floats] = _choice.fn["draw"](logits, params, uniforms)
    return out


def draw_on_device(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> Tensor:
    """One token of each row, where the logits are: see `reference.device_sampling.draw`."""
    out: Tensor = _choice.fn["draw_on_device"](logits, params, uniforms)
    return out


def tell_on_device(logits: Tensor, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """What logprobs are made of, where the logits are: see `reference.device_sampling.told`."""
    out: Tensor = _choice.fn["tell_on_device"](logits, rows, tokens, count)
    return out


choose(torch.device("cpu"))
