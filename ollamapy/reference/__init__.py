"""Every op in plain torch, float32 inside: the fallback of every kernel, and the oracle that kernels are tested against.

One promise beyond the values: a row's result does not depend, bit for bit, on the rows beside it. torch breaks that in three
ways, and each is avoided by construction:
- a BLAS picks its summation order by the number of rows. Rows go through it in multiples of `ROW_TILE`: measured equal
  (MKL, AVX-512) for every multiple of 4 up to 704 rows, K a multiple of 4 from 32 to 14336, 1 to 16 threads. 1, 2 and 3 rows
  differ from all others, and with several threads 5, 6, 7 and 9 too.
- silu, gelu and sigmoid round differently in the tail of a vector loop; exp and tanh do not, so these are made of them.
- sums over the keys would group them by the length of the cache. Attention (`attention.py`) adds tiles of positions in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ollamapy.engine.batch import KVCache, LayerState
from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor

ROW_TILE = 4
FP8_MOST = 448.0  # the largest float8_e4m3fn; of more NVIDIA's conversion makes this, torch before 2.13 NaN
Activation = Literal["silu", "gelu_tanh"]
Gating = Literal["softmax", "sigmoid", "softmax_selected"]


def pad_rows(x: Tensor) -> Tensor:
    """x with rows of zeros appended up to a multiple of ROW_TILE. A whole forward pass pads once, here."""
    missing = -x.shape[0] % ROW_TILE
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def prepare_linear(weight: QuantTensor, device: torch.device) -> Tensor:
    """Dense float32 on the device; what is float32 in the file is used where it lies, mapped and not copied."""
    weight = weight.to(device)
    if weight.type is GGMLType.F32 and weight.data.data_ptr() % 4 == 0:
        return weight.data.view(torch.float32).view(weight.shape)
    return weight.dequantize()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N), float32."""
    rows = x.shape[0]
    if rows % ROW_TILE:
        return F.linear(pad_rows(x), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def prepare_embedding(weight: QuantTensor, device: torch.device) -> QuantTensor:
    return weight.to(device)


def embedding(token_ids: Tensor, weight: QuantTensor) -> Tensor:
    """(n,) int64 -> (n, E) float32. Reads and decodes only the rows that are asked for."""
    return weight.gather(token_ids)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    scale = torch.mul(x, x).sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.mul(centred, centred).mean(-1, keepdim=True).add_(eps).rsqrt_()
    centred.mul_(scale).mul_(weight)
    return centred if bias is None else centred.add_(bias)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Turns the first n_rot elements of each head of q and k (n, heads, D), in place (Su et al. 2021).

    cos and sin are (n, 1, n_rot), laid out as the elements are: pairs (2i, 2i + 1) when interleaved, else (i, i + n_rot / 2);
    sin is negative at the first element of each pair.
    """
    for heads in (q, k):
        turned = heads[..., : cos.shape[-1]]
        if interleaved:
            partner = turned.reshape(*turned.shape[:-1], -1, 2).flip(-1).flatten(-2)
        else:
            partner = turned.roll(cos.shape[-1] // 2, -1)
        turned.mul_(cos).add_(partner.mul_(sin))


def gated_activation(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """act(gate) * up, in gate's memory (Shazeer 2020)."""
    if kind == "silu":
        return gate.div_(torch.neg(gate).exp_().add_(1.0)).mul_(up)
    cubic = torch.mul(gate, gate).mul_(gate).mul_(0.044715).add_(gate)
    return gate.mul_(0.5).mul_(cubic.mul_(math.sqrt(2.0 / math.pi)).tanh_().add_(1.0)).mul_(up)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


def new_cache(state: LayerState, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """key (num_blocks, block_size, Hkv, D), value (num_blocks, block_size, Hkv, Dv). Zeros: stale memory must hold no NaN.

    dtype uint8 stands for q8_0: the last dimension then is bytes, 34 for each 32 elements, as in the file format.
    """
    slots = (num_blocks, block_size, state.num_kv_heads)
    widths = [length // 32 * 34 if dtype is torch.uint8 else length for length in (state.key_length, state.value_length)]
    key, value = (torch.zeros(*slots, width, dtype=dtype, device=device) for width in widths)
    return KVCache(key, value)


def q8_0_blocks(x: Tensor) -> Tensor:
    """x (..., D) float32, D a multiple of 32 -> Q8_0 blocks (..., D / 32 * 34) uint8.

    The scale is max|x| / 127 as a half, and the quants are multiples of that half: no value is off by more than half of it.
    An infinity or a NaN becomes the scale, and makes all 32 values NaN.
    """
    groups = x.view(*x.shape[:-1], -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127.0).half()
    step = scale.float()
    inverse = torch.where((step > 0) & step.isfinite(), 1.0 / step, 0.0)
    quants = (groups * inverse).nan_to_num(0.0).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), quants.view(torch.uint8)), -1).flatten(-2)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Rows of k (n, Hkv, D) and v (n, Hkv, Dv) to their slots. Rows beyond slot_mapping are padding and are left out."""
    rows = slot_mapping.shape[0]
    for store, new in ((cache.key, k), (cache.value, v)):
        if store.dtype is torch.float8_e4m3fn:  # as bytes, since torch indexes no fp8
            held, store = new[:rows].clamp(-FP8_MOST, FP8_MOST).to(store.dtype).view(torch.uint8), store.view(torch.uint8)
        else:
            held = q8_0_blocks(new[:rows]) if store.dtype is torch.uint8 else new[:rows].to(store.dtype)
        store.flatten(0, 1).index_copy_(0, slot_mapping, held)


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses its experts."""

    used: int
    gating: Gating = "softmax"
    renormalize: bool = True
    scale: float = 0.0  # 0: none


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Router logits (n, X) -> experts (n, used) int64 and their weights (n, used) float32."""
    if routing.gating == "softmax_selected":
        chosen, ids = logits.topk(routing.used, dim=-1)
        return ids, chosen.softmax(-1)
    sigmoid = routing.gating == "sigmoid"
    scores = torch.neg(logits).exp_().add_(1.0).reciprocal_() if sigmoid else logits.softmax(-1)
    weights, ids = scores.topk(routing.used, dim=-1)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_(min=2.0**-14)
    return ids, weights * routing.scale if routing.scale else weights


def _expert_linear(rows: Tensor, weight: Tensor, expert: int) -> Tensor:
    return linear(rows, weight[expert])


def moe(
    x: Tensor,
    logits: Tensor,
    experts: tuple[Any, Any, Any],
    routing: Routing,
    kind: Activation,
    multiply: Callable[[Tensor, Any, int], Tensor] = _expert_linear,
) -> Tensor:
    """Mixture of gated experts: x (n, E), logits (n, X), experts gate and up (X, F, E) and down (X, E, F) -> (n, E).

    Each expert's rows go through its three matrices together, by `multiply(rows, matrices, expert)`.
    """
    gate, up, down = experts
    ids, weights = route(logits, routing)
    parts = x.new_empty(*ids.shape, x.shape[-1])  # each expert's answer in its own place: the sum has one order
    for expert in sorted(set(ids.flatten().tolist())):
        token, place = (ids == expert).nonzero(as_tuple=True)
        rows = x[token]
        inner = gated_activation(multiply(rows, gate, expert), multiply(rows, up, expert), kind)
        parts[token, place] = multiply(inner, down, expert)
    parts.mul_(weights.unsqueeze(-1))
    total = parts[:, 0].clone()
    for place in range(1, routing.used):
        total += parts[:, place]
    return total
