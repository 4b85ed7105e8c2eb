"""Decoder layers, one after the other, with few launches each: what `ops.stack` is on a GPU.

A dense layer of up to four rows is eight launches: norm, q/k/v, heads to their places, attention (two when keys are split),
output projection onto the residual stream, norm, gate and up with the activation, down onto the stream. Matrices that read the
same rows and are of one type are joined into one when the stack is made; the layer's own are views of them then. What
multiplies is `project`, so that another family of matmuls on the same planes can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.triton_kernels import attention, layout, linear, moe, norm, tuning
from ollamapy.triton_kernels.layout import Planes
from ollamapy.triton_kernels.place import Turn, place

if TYPE_CHECKING:
    from ollamapy.cpu_kernels import DecoderLayer

Project = Callable[..., Tensor]


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
    gate_up: Planes | None  # None: of two types, or experts
    experts: moe.Experts | None


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
        return Layer(facts, qkv, weights["gate"], None)
    alike = weights["gate"].type is weights["up"].type
    joined = layout.join([weights["gate"], weights["up"]]) if alike else None
    if facts.routing is None:
        return Layer(facts, qkv, joined, None)
    return Layer(facts, qkv, None, moe.Experts(weights["gate"], weights["up"], weights["down"], joined))


def stack(layers: Sequence[DecoderLayer], project: Project = linear.project) -> Stack | str:
    """A `Stack`, or why it cannot take the layers. `project`: see `linear.project`."""
    for layer in layers:
        foreign = [name for name, weight in layer.weights.items() if not isinstance(weight, Planes)]
        if foreign:
            return f"{', '.join(foreign)} are for other kernels"
    return Stack([_layer(layer) for layer in layers], project)


class Stack:
    """Decoder layers that one call runs through."""

    def __init__(self, layers: Sequence[Layer], project: Project) -> None:
        self._layers, self._project = layers, project

    def __call__(
        self, x: Tensor, batch: Batch, caches: Sequence[KVCache], ropes: Sequence[Tensor], temperature: Tensor | None
    ) -> Tensor:
        """x (n, E) float32 through all layers, in place. ropes: (positions, n_rot), cosines then sines of each pair."""
        if not x.shape[0]:
            return x
        plan = attention.plan(batch, caches[0])
        dtype = tuning.activations(x.device)
        facts = [layer.facts for layer in self._layers]
        firsts = [layer.vectors["attn_norm"] for layer in facts[1:]]
        h = norm.rms_norm(x, facts[0].vectors["attn_norm"], facts[0].eps, dtype)
        for layer, cache, following in zip(self._layers, caches, [*firsts, None], strict=True):
            turned = self._heads(layer, h, batch, cache, ropes, temperature)
            seen = self._attend(layer.facts, turned, cache, plan)
            vectors, eps = layer.facts.vectors, layer.facts.eps
            write = partial(self._project, seen, layer.facts.weights["o"], bias=layer.facts.biases.get("o"))
            h = _onto(x, write, vectors.get("post_attn_norm"), vectors["ffn_norm"], eps, dtype)
            h = _onto(x, self._feed_forward(layer, h), vectors.get("post_ffn_norm"), following, eps, dtype)
        return x

    def _heads(
        self,
        layer: Layer,
        h: Tensor,
        batch: Batch,
        cache: KVCache,
        ropes: Sequence[Tensor],
        temperature: Tensor | None,
    ) -> Tensor:
        """Queries (n, H, D); keys and values are in the cache then."""
        facts = layer.facts
        qkv = torch.empty(h.shape[0], layer.qkv[-1].stop, dtype=h.dtype, device=h.device)
        for part in layer.qkv:
            self._project(h, part.weight, qkv[:, part.start : part.stop], bias=part.bias)
        vectors = facts.vectors
        turn = Turn(ropes[facts.rope_index], facts.rope_interleaved, vectors.get("q_norm"), vectors.get("k_norm"), facts.eps)
        temper = temperature if facts.temper else None
        return place(qkv, facts.num_heads, turn, batch.positions, temper, cache, batch.slot_mapping)

    @staticmethod
    def _attend(facts: DecoderLayer, q: Tensor, cache: KVCache, plan: attention.AttentionPlan) -> Tensor:
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

    def _feed_forward(self, layer: Layer, h: Tensor) -> Callable[..., Tensor]:
        """What writes the feed-forward of h: takes `out` and `add`."""
        facts = layer.facts
        weights = facts.weights
        if layer.experts is not None:
            assert facts.routing is not None
            logits = torch.empty(h.shape[0], weights["router"].rows, dtype=torch.float32, device=h.device)
            self._project(h, weights["router"], logits, bias=facts.biases.get("router"))
            return partial(moe.mix, h, logits, layer.experts, facts.routing, facts.activation)
        inner = torch.empty(h.shape[0], weights["down"].shape[-1], dtype=h.dtype, device=h.device)
        if layer.gate_up is not None:
            self._project(h, layer.gate_up, inner, gate=facts.activation)
        else:
            up = self._project(h, weights["up"], torch.empty_like(inner))
            gate = self._project(h, weights["gate"], torch.empty_like(inner))
            linear.gated_activation(gate, up, facts.activation, inner)
        return partial(self._project, inner, weights["down"], bias=facts.biases.get("down"))


def _onto(
    x: Tensor, write: Callable[..., Any], post: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Adds a branch to the residual stream x, normed by `post` where a model does that; the norm of the sum by `weight`."""
    if post is None:
        write(out=x, add=True)
        return x if weight is None else norm.rms_norm(x, weight, eps, dtype)
    branch = torch.empty_like(x)
    write(out=branch, add=False)
    return norm.add_norm(branch, x, eps, weight, post, dtype)
