"""Decoder layers, one after the other, with few launches each: what `ops.stack` is on a GPU.

A dense layer of up to four rows is eight launches: norm, q/k/v, heads to their places, attention (two when keys are split),
output projection onto the residual stream, norm, gate and up with the activation, down onto the stream. Matrices that read the
same rows and are of one type are joined into one when the stack is made; the layer's own are views of them then. What
multiplies, and what is fused with that, is a `Products`, so that another family of matmuls can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.reference import Activation
from ollamapy.triton_kernels import attention, attention_plan, layout, linear, moe, norm, tuning
from ollamapy.triton_kernels.layout import Planes
from ollamapy.triton_kernels.place import Turn, place

if TYPE_CHECKING:
    from ollamapy.cpu_kernels import DecoderLayer


class Norm(NamedTuple):
    """What stands between two branches: weights (E,), None where a model has no norm there, or where nothing reads the sum."""

    weight: Tensor | None
    eps: float
    post: Tensor | None = None  # of the branch, before it is added


class Products(Protocol):
    """A family of matmuls with what it fuses. Rows are activations in a form that its `project` takes; a Tensor always is."""

    def norm(self, x: Tensor, by: Norm, branch: Tensor | None, readers: Sequence[Planes], dtype: torch.dtype) -> Any:
        """The residual stream x (n, E) float32 += branch, in place; the norm of the sum as rows for all `readers`, or as a
        Tensor of `dtype` where there are none."""
        ...

    def project(self, rows: Any, weight: Planes, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
        """rows W^T + bias into `out` (n, N), or onto it."""
        ...

    def gated(self, rows: Any, weights: Sequence[Planes], kind: Activation, down: Planes, dtype: torch.dtype) -> Any:
        """act(gate) * up of rows, as rows for `down`. `weights`: gate and up, or one that has the rows of both."""
        ...

    def place(
        self, qkv: Tensor, heads: int, turn: Turn, batch: Batch, temper: Tensor | None, cache: KVCache, dtype: torch.dtype
    ) -> Tensor:
        """See `place.place`; the queries in `dtype`. `batch` is the one of the cache's group."""
        ...

    def qkv_dtype(self, cache: KVCache, dtype: torch.dtype) -> torch.dtype:
        """The type in which `place` wants q, k and v."""
        ...


class Floats:
    """Triton's: rows are Tensors."""

    def norm(self, x: Tensor, by: Norm, branch: Tensor | None, readers: Sequence[Planes], dtype: torch.dtype) -> Tensor:
        if branch is not None:
            return norm.add_norm(branch, x, by.eps, by.weight, by.post, dtype)
        return x if by.weight is None else norm.rms_norm(x, by.weight, by.eps, dtype)

    def project(self, rows: Tensor, weight: Planes, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
        return linear.project(rows, weight, out, bias=bias, add=add)

    def gated(self, rows: Tensor, weights: Sequence[Planes], kind: Activation, down: Planes, dtype: torch.dtype) -> Tensor:
        inner = torch.empty(rows.shape[0], down.shape[-1], dtype=dtype, device=rows.device)
        if len(weights) == 1:
            return linear.project(rows, weights[0], inner, gate=kind)
        gate, up = (linear.project(rows, weight, torch.empty_like(inner)) for weight in weights)
        return linear.gated_activation(gate, up, kind, inner)

    def place(
        self, qkv: Tensor, heads: int, turn: Turn, batch: Batch, temper: Tensor | None, cache: KVCache, dtype: torch.dtype
    ) -> Tensor:
        return place(qkv, heads, turn, batch.positions, temper, cache, batch.slot_mapping)

    def qkv_dtype(self, cache: KVCache, dtype: torch.dtype) -> torch.dtype:
        return dtype


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix whose product is columns start:stop of what it is a part of."""

    weight: Planes
    bias: Tensor | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer as it is run."""

    facts: DecoderLayer
    qkv: tuple[Part, ...]
    gate_up: tuple[Planes, ...]  # joined where they are of one type; none: experts
    experts: moe.Experts | None

    @property
    def attention_norm(self) -> Tensor:
        return self.facts.vectors["attn_norm"]

    @property
    def readers(self) -> tuple[Planes, ...]:
        """What reads the norm before attention."""
        return tuple(part.weight for part in self.qkv)


def _joined(parts: Sequence[tuple[Planes, Tensor | None]]) -> tuple[Part, ...]:
    """Neighbours of one type become one matrix."""
    groups: list[list[tuple[Planes, Tensor | None]]] = []
    for part in parts:
        if groups and groups[-1][0][0].type is part[0].type:
            groups[-1].append(part)
        else:
            groups.append([part])
    found, start = [], 0
    for group in groups:
        weights = [weight for weight, _ in group]
        biases = [torch.zeros(weight.rows, device=weight.low.device) if bias is None else bias for weight, bias in group]
        stop = start + sum(weight.rows for weight in weights)
        bias = torch.cat(biases) if any(bias is not None for _, bias in group) else None
        found.append(Part(layout.join(weights) if len(weights) > 1 else weights[0], bias, start, stop))
        start = stop
    return tuple(found)


def _layer(facts: DecoderLayer) -> Layer:
    weights, biases = facts.weights, facts.biases
    qkv = _joined([(weights[name], biases.get(name)) for name in ("q", "k", "v") if name in weights])
    if "up" not in weights:  # gate has the rows of both
        return Layer(facts, qkv, (weights["gate"],), None)
    both = weights["gate"], weights["up"]
    joined = layout.join(both) if both[0].type is both[1].type else None
    if facts.routing is None:
        return Layer(facts, qkv, both if joined is None else (joined,), None)
    return Layer(facts, qkv, (), moe.Experts(*both, weights["down"], joined))


def stack(layers: Sequence[DecoderLayer], products: Products | None = None) -> Stack | str:
    """A `Stack`, or why it cannot take the layers."""
    for layer in layers:
        foreign = [name for name, weight in layer.weights.items() if not isinstance(weight, Planes)]
        if foreign:
            return f"{', '.join(foreign)} are for other kernels"
    return Stack([_layer(layer) for layer in layers], products or Floats())


class Stack:
    """Decoder layers that one call runs through."""

    def __init__(self, layers: Sequence[Layer], products: Products) -> None:
        self._layers, self._products = layers, products

    def by(self, products: Products) -> Stack:
        """The same layers multiplied by another family."""
        return Stack(self._layers, products)

    def __call__(
        self, x: Tensor, batch: Batch, caches: Sequence[KVCache], ropes: Sequence[Tensor], temperature: Tensor | None
    ) -> Tensor:
        """x (n, E) float32 through all layers, in place. ropes: (positions, n_rot), cosines then sines of each pair."""
        if not x.shape[0]:
            return x
        plans = [attention_plan.plan(seen, caches[0]) for seen in batch.groups]
        first, products = self._layers[0], self._products
        dtype = tuning.activations(x.device, first.qkv[0].weight.precise)
        h = products.norm(x, Norm(first.attention_norm, first.facts.eps), None, first.readers, dtype)
        for layer, cache, following in zip(self._layers, caches, [*self._layers[1:], None], strict=True):
            facts, seen = layer.facts, batch.groups[cache.group]
            turned = self._heads(layer, h, seen, cache, ropes[facts.rope_index], temperature, dtype)
            attended = self._attend(facts, turned, cache, plans[cache.group])
            vectors = facts.vectors
            write = partial(products.project, attended, facts.weights["o"], bias=facts.biases.get("o"))
            between = Norm(vectors["ffn_norm"], facts.eps, vectors.get("post_attn_norm"))
            h = products.norm(x, between, _branch(x, write, between), layer.gate_up, dtype)
            write = self._feed_forward(layer, h, dtype)
            after = Norm(following and following.attention_norm, facts.eps, vectors.get("post_ffn_norm"))
            h = products.norm(x, after, _branch(x, write, after), following.readers if following else (), dtype)
        return x

    def _heads(
        self, layer: Layer, h: Any, batch: Batch, cache: KVCache, table: Tensor, temperature: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Queries (n, H, D); keys and values are in the cache then."""
        facts, vectors = layer.facts, layer.facts.vectors
        wanted = self._products.qkv_dtype(cache, dtype)
        qkv = torch.empty(batch.num_tokens, layer.qkv[-1].stop, dtype=wanted, device=table.device)
        for part in layer.qkv:
            self._products.project(h, part.weight, qkv[:, part.start : part.stop], bias=part.bias)
        turn = Turn(table, facts.rope_interleaved, vectors.get("q_norm"), vectors.get("k_norm"), facts.eps)
        return self._products.place(qkv, facts.num_heads, turn, batch, temperature if facts.temper else None, cache, dtype)

    @staticmethod
    def _attend(facts: DecoderLayer, q: Tensor, cache: KVCache, plan: attention_plan.AttentionPlan) -> Tensor:
        return attention.attention(
            q,
            cache,
            plan,
            scale=facts.scale,
            window=facts.state.window,
            cap=facts.softcap,
            sinks=facts.vectors.get("sinks"),
            causal=facts.causal,
        )

    def _feed_forward(self, layer: Layer, h: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
        """What writes the feed-forward of h: takes `out` and `add`."""
        facts, weights = layer.facts, layer.facts.weights
        if layer.experts is not None:
            assert facts.routing is not None
            logits = torch.empty(h.shape[0], weights["router"].rows, dtype=torch.float32, device=h.device)
            self._products.project(h, weights["router"], logits, bias=facts.biases.get("router"))
            return partial(moe.mix, h, logits, layer.experts, facts.routing, facts.activation)
        inner = self._products.gated(h, layer.gate_up, facts.activation, weights["down"], dtype)
        return partial(self._products.project, inner, weights["down"], bias=facts.biases.get("down"))


def _branch(x: Tensor, write: Callable[..., Any], by: Norm) -> Tensor | None:
    """Adds a branch to the residual stream x; where it has to be normed before, the branch itself."""
    if by.post is None:
        write(out=x, add=True)
        return None
    branch = torch.empty_like(x)
    write(out=branch, add=False)
    return branch
