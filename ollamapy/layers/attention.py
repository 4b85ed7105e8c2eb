"""Attention of one layer: project, normalise, turn, remember, attend, project back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import AdapterRows, KVCache
from ollamapy.layers.layer import Declared, Layer, Part
from ollamapy.layers.linear import Linear
from ollamapy.layers.norm import RMSNorm, identity
from ollamapy.layers.spec import AttentionSpec, Rope


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share. Rows are the batch's, padded with rows that belong to nobody."""

    plans: Sequence[Any]  # of ops.attention, by the layer's group
    slot_mappings: Sequence[Tensor]
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]  # cos and sin (n, 1, n_rot)
    temperature: Tensor | None  # (n, 1, 1), for layers with query_temperature
    adapters: Sequence[AdapterRows] = ()


class Sinks(Layer):
    """An extra logit per head (H)."""

    weight: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__(weight=Declared((num_heads,), "dense"))


class Attention(Part):
    """(n, E) -> (n, E); writes the rows' keys and values to the cache before it reads it."""

    def __init__(self, spec: AttentionSpec, embedding_length: int, norm_eps: float) -> None:
        self.spec = spec
        self.widths = (
            spec.num_heads * spec.key_length,
            spec.num_kv_heads * spec.key_length,
            spec.num_kv_heads * spec.value_length,
        )
        if spec.fused_qkv:
            self.attn_qkv = Linear(embedding_length, sum(self.widths), bias=spec.qkv_bias[0])
        else:
            self.attn_q = Linear(embedding_length, self.widths[0], bias=spec.qkv_bias[0])
            self.attn_k = Linear(embedding_length, self.widths[1], bias=spec.qkv_bias[1])
            self.attn_v = Linear(embedding_length, self.widths[2], bias=spec.qkv_bias[2])
        self.attn_output = Linear(spec.num_heads * spec.value_length, embedding_length, bias=spec.output_bias)
        self.attn_q_norm = RMSNorm(spec.key_length, norm_eps) if spec.qk_norm else identity
        self.attn_k_norm = RMSNorm(spec.key_length, norm_eps) if spec.qk_norm else identity
        if spec.sinks:
            self.attn_sinks = Sinks(spec.num_heads)
        self._project = self._project_fused if spec.fused_qkv else self._project_each
        self._temper = self._by_position if spec.query_temperature else self._as_it_is

    def __call__(self, x: Tensor, step: Step, cache: KVCache) -> Tensor:
        spec = self.spec
        q, k, v = self._project(x, step.adapters)
        q = self.attn_q_norm(q.view(-1, spec.num_heads, spec.key_length))
        k = self.attn_k_norm(k.view(-1, spec.num_kv_heads, spec.key_length))
        cos, sin = step.rotary[spec.rope]
        ops.rope(q, k, cos, sin, spec.interleaved_rope)
        ops.write_kv(k, v.view(-1, spec.num_kv_heads, spec.value_length), cache, step.slot_mappings[cache.group])
        seen = ops.attention(
            self._temper(q, step),
            cache,
            step.plans[cache.group],
            scale=spec.scale,
            window=spec.window,
            cap=spec.softcap,
            sinks=self.attn_sinks.weight if spec.sinks else None,
            causal=spec.causal,
        )
        return self.attn_output(seen, step.adapters)

    def matrices(self) -> dict[str, Linear]:
        """By their part in `ops.DecoderLayer`."""
        if self.spec.fused_qkv:
            return {"q": self.attn_qkv, "o": self.attn_output}
        return {"q": self.attn_q, "k": self.attn_k, "v": self.attn_v, "o": self.attn_output}

    def _project_each(self, x: Tensor, adapters: Sequence[AdapterRows]) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn_q(x, adapters), self.attn_k(x, adapters), self.attn_v(x, adapters)

    def _project_fused(self, x: Tensor, adapters: Sequence[AdapterRows]) -> tuple[Tensor, ...]:
        return torch.split(self.attn_qkv(x, adapters), list(self.widths), dim=1)

    def _by_position(self, q: Tensor, step: Step) -> Tensor:
        assert step.temperature is not None
        return q.mul_(step.temperature)

    def _as_it_is(self, q: Tensor, step: Step) -> Tensor:
        return q
