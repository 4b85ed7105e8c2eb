"""The C++ kernels for the CPU as `ops` wants them: its arguments to those of `torch.ops.ollamapy` (csrc/ops.cpp).

Weights are packed once at load into tiles of 16 rows that hold the file's bits, permuted; activations become int8 per 32 with
float32 scales, dots of a group are exact integers, and floats are added over groups in one order at every batch size. Types of
few values (`quant.forms`) take 5 or 6 bits a weight there, with the same values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ollamapy import extension
from ollamapy.cores import MAX_THREADS
from ollamapy.cpu_memory import untouched
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.types import GGMLType
from ollamapy.quant.coded import cpu_table
from ollamapy.quant.forms import CODED
from ollamapy.quant.tensor import QuantTensor
from ollamapy.reference import Activation, Routing
from ollamapy.reference import moe as reference_moe

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16  # tokens of a KV block: the lanes of a score
HEAD_LENGTHS = (16, 256)  # the shortest and the longest
PLANES = 3  # int8 rows that hold a float32 one: each gains 8 bits
Q8_GROUP_BYTES = 544  # 32 components of 16 tokens in q8_0
PACKED = frozenset(
    GGMLType[name]
    for name in "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()  # noqa: SIM905
)
"""Types whose tiles hold the file's bits."""

_ABSENT = torch.empty(0)
_NO_TILES = torch.empty(0, dtype=torch.uint8)


def kernels() -> Any:
    """`torch.ops.ollamapy`. Only for ops whose `needs` has seen that the extension is there."""
    return extension.load()


def set_threads(count: int) -> None:
    """Of the kernels, which take `MAX_THREADS` at most."""
    if count > MAX_THREADS:
        log.warning("the CPU kernels take %d threads, not %d", MAX_THREADS, count)
    kernels().set_threads(min(count, MAX_THREADS))


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight (rows, columns), or one of each expert, in tiles: data (T, bytes) or (X, T, bytes) uint8.

    planes: into how many int8 rows activations are taken apart; float weights take them as they are.
    """

    data: Tensor
    type: GGMLType
    rows: int
    columns: int
    planes: int = 1

    def expert(self, index: int) -> Packed:
        return replace(self, data=self.data[index])


def prepare_linear(weight: QuantTensor, device: torch.device) -> Packed:
    return _pack(weight, GGMLType.F16, 1)


def prepare_precise(weight: QuantTensor, device: torch.device) -> Packed:
    """For activations that keep the precision of float32."""
    return _pack(weight, GGMLType.F32, PLANES)


def _pack(weight: QuantTensor, otherwise: GGMLType, planes: int) -> Packed:
    """A type that no kernel reads becomes `otherwise`, a float type."""
    type, data = weight.type, weight.data
    if type not in PACKED and type not in CODED:
        type = otherwise
        data = weight.dequantize().to(torch.float16 if otherwise is GGMLType.F16 else torch.float32).view(torch.uint8)
    rows, columns = weight.shape[-2:]
    tiles = kernels().pack_weight(data.contiguous(), int(type), columns, cpu_table(type))
    return Packed(tiles, type, rows, columns, 1 if type in _DENSE else planes)


def embedding(token_ids: Tensor, weight: Packed) -> Tensor:
    """(n,) int64 -> (n, K): rows of a weight that `linear` holds."""
    out: Tensor = kernels().embedding_tiles(weight.data, int(weight.type), weight.rows, weight.columns, token_ids)
    return out


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N)."""
    out: Tensor = kernels().linear(x.contiguous(), weight.data, int(weight.type), weight.rows, bias, weight.planes)
    return out


def embedding_rows(token_ids: Tensor, weight: QuantTensor) -> Tensor:
    """(n,) int64 -> (n, E) float32: rows of a weight as the file has them."""
    out: Tensor = kernels().embedding_rows(weight.data, int(weight.type), token_ids)
    return out


def moe(x: Tensor, logits: Tensor, experts: tuple[Packed, Packed, Packed], routing: Routing, kind: Activation) -> Tensor:
    """See `reference.moe`."""
    return reference_moe(x, logits, experts, routing, kind, lambda rows, packed, expert: linear(rows, packed.expert(expert)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension of float32 x: one call, where torch takes six."""
    out: Tensor = kernels().rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    return out.view(x.shape)


def pad_rows(x: Tensor) -> Tensor:
    """The kernels take any number of rows."""
    return x


def new_cache(state: LayerState, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """key (num_blocks, Hkv, D, 16), value (num_blocks, Hkv, 16, Dv). Zeros: stale memory must hold no NaN.

    dtype uint8 stands for q8_0: both are (num_blocks, Hkv, length / 32, 544): 32 components and the scales of 16 tokens.
    """
    if block_size != BLOCK_TOKENS:
        raise UnsupportedModel(f"the CPU kernels have KV blocks of {BLOCK_TOKENS} tokens, not {block_size}")
    heads = num_blocks, state.num_kv_heads
    if dtype is torch.uint8:
        key, value = ((*heads, length // 32, Q8_GROUP_BYTES) for length in (state.key_length, state.value_length))
    else:
        key, value = (*heads, state.key_length, BLOCK_TOKENS), (*heads, BLOCK_TOKENS, state.value_length)
    return KVCache(untouched(key, dtype), untouched(value, dtype))


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    kernels().write_kv(k.contiguous(), v.contiguous(), cache.key, cache.value, slot_mapping)


def plan_attention(batch: Batch, cache: KVCache) -> Batch:
    """The batch says it all."""
    return batch


def attention(
    q: Tensor,
    cache: KVCache,
    plan: Batch,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """(n, H, D) -> (n, H * Dv)."""
    out: Tensor = kernels().attention(
        *(q.flatten(1).contiguous(), cache.key, cache.value),
        *(plan.block_table, plan.query_start, plan.seq_lens),
        *(q.shape[1], scale, cap, window, causal, sinks),
    )
    return out


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """A pre-norm decoder layer with gated feed-forward, as `Stack` takes it.

    weights and biases: q (alone: the rows of q, k and v), k, v, o, gate (alone: the rows of gate and up), up, down, in the form
    of the linear kernel. With `routing`, gate, up and down are those of all experts, and router has a row for each.
    vectors: attn_norm, post_attn_norm, ffn_norm, post_ffn_norm, q_norm, k_norm, sinks; what a model does not have is left out.
    """

    weights: Mapping[str, Any]
    biases: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    num_heads: int
    state: LayerState
    scale: float
    softcap: float
    causal: bool
    rope_index: int  # into the tables that Stack is called with
    rope_dims: int
    rope_interleaved: bool
    activation: Activation
    temper: bool
    eps: float
    routing: Routing | None = None


def stack(layers: Sequence[DecoderLayer]) -> Stack | str:
    """A `Stack`, or why it cannot take the layers."""
    reasons = filter(None, map(misfit, layers))
    return next(reasons, "") or Stack(layers)


def misfit(layer: DecoderLayer) -> str:
    """Why `Stack` cannot take a layer, "" when it can."""
    for part, weight in layer.weights.items():
        if (weight.rows % 16 and part != "router") or weight.columns % 16:
            return f"{part} is {weight.rows} x {weight.columns}, not of multiples of 16"
    for inputs in (("q", "k", "v"), ("gate", "up")):
        if len({layer.weights[part].type in _DENSE for part in inputs if part in layer.weights}) > 1:
            return f"float and quantized weights among {', '.join(inputs)}"
    return ""


_DENSE = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_PARTS = ("q", "k", "v", "o", "gate", "up", "down", "router")
_GATINGS = ("softmax", "sigmoid", "softmax_selected")
_VECTORS = ("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm", "q_norm", "k_norm", "sinks")


def _routing_facts(layer: DecoderLayer) -> tuple[int, int, int, int]:
    """Experts, those used, gating, renormalize."""
    routing = layer.routing
    if routing is None:
        return 0, 0, 0, 0
    return layer.weights["router"].rows, routing.used, _GATINGS.index(routing.gating), int(routing.renormalize)


class Stack:
    """Decoder layers that one call runs through: no Python between them."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._library = kernels()
        self._layers = [self._add(layer) for layer in layers]

    def _add(self, layer: DecoderLayer) -> int:
        weights = [layer.weights.get(part) for part in _PARTS]
        state = layer.state
        facts = [
            *(layer.num_heads, state.num_kv_heads, state.key_length, state.value_length, state.window, int(layer.causal)),
            *(layer.rope_dims, 2 if layer.rope_interleaved else 1, layer.rope_index),
            *(int(layer.activation == "gelu_tanh"), int(layer.temper)),
            *_routing_facts(layer),
            max(weight.planes for weight in weights if weight),
        ]
        scaled = layer.routing is not None and layer.routing.gating != "softmax_selected" and layer.routing.scale
        handle: int = self._library.layer_new(
            [weight.data if weight else _NO_TILES for weight in weights],
            [int(weight.type) if weight else 0 for weight in weights],
            [weight.rows if weight else 0 for weight in weights],
            [weight.columns if weight else 0 for weight in weights],
            [layer.biases.get(part, _ABSENT) for part in _PARTS],
            [layer.vectors.get(vector, _ABSENT) for vector in _VECTORS],
            facts,
            [layer.scale, layer.softcap, layer.eps, scaled or 1.0],
        )
        return handle

    def __call__(
        self, x: Tensor, batch: Batch, caches: Sequence[KVCache], ropes: Sequence[Tensor], temperature: Tensor | None
    ) -> Tensor:
        """x (n, E) float32 through all layers, in place. ropes: (positions, n_rot), cosines then sines of each pair."""
        self._library.decoder(
            *(self._layers, x, batch.positions, [seen.slot_mapping for seen in batch.groups]),
            *([seen.block_table for seen in batch.groups], batch.query_start, batch.seq_lens),
            *([cache.key for cache in caches], [cache.value for cache in caches], [cache.group for cache in caches]),
            *(ropes, temperature),
        )
        return x

    def __del__(self) -> None:
        for layer in self._layers:
            self._library.layer_free(layer)
