"""Decoder: the model that most architectures are. An architecture's file says how its `Traits` differ, and little else.

Token ids in, hidden states and logits out. Knows no text, no sampling, no scheduling, and no file format: tensors come
from `load.py` by the names that the module tree spells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.protocol import LayerGroup
from ollamapy.layers.attention import Step
from ollamapy.layers.block import DecoderBlock
from ollamapy.layers.embedding import Embedding
from ollamapy.layers.layer import Module
from ollamapy.layers.linear import Linear
from ollamapy.layers.norm import RMSNorm
from ollamapy.layers.rope import RopeFactors, RotaryTable, inverse_frequencies, magnitude
from ollamapy.layers.spec import Activation, AttentionSpec, ExpertsSpec, FeedForwardSpec, LayerSpec, Rope
from ollamapy.models.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""The tensors of a file: name -> shape in torch order."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What an architecture fixes without saying so in metadata. Biases, fused tensors and experts show in the file itself."""

    interleaved_rope: bool = False
    activation: Activation = "silu"
    qkv_bias: bool = False  # required; without it, biases are used where the file has them
    qk_norm: bool = False
    post_norms: bool = False
    scale_embedding: bool = False  # by sqrt(embedding_length)


class Decoder(Module):
    """Pre-norm transformer decoder over a paged KV cache. Attributes are named as the file's tensors."""

    traits = Traits()

    def __init__(self, config: ModelConfig, shapes: Shapes, context_length: int = 0) -> None:
        """`context_length`: the longest sequence that will be run, for rope factors that depend on it; 0: the trained one."""
        self.config = config
        self.context_length = context_length or config.context_length
        self.weight_bytes = 0  # measured by load.py
        rows = shapes.get("token_embd.weight", (config.vocab_size,))[0]
        self.token_embd = Embedding(rows, config.embedding_length)
        self.rope_freqs = self._rope_factors("rope_freqs", shapes)
        self.rope_factors_long = self._rope_factors("rope_factors_long", shapes)
        self.rope_factors_short = self._rope_factors("rope_factors_short", shapes)
        specs = [self._layer_spec(layer, shapes) for layer in range(config.block_count)]
        self.blk = [DecoderBlock(spec, layer) for layer, spec in enumerate(specs)]
        self.output_norm = RMSNorm(config.embedding_length, config.norm_eps)
        tied_to = "" if "output.weight" in shapes else "token_embd.weight"
        self.output = Linear(config.embedding_length, rows, bias="output.bias" in shapes, tied_to=tied_to)
        self.embedding_scale = math.sqrt(config.embedding_length) if self.traits.scale_embedding else 1.0
        self._rotary: dict[Rope, RotaryTable] = {}
        self._stack: Any | None = None

    def new_caches(
        self,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[LayerGroup] = (),
    ) -> list[KVCache]:
        """What each layer keeps per token, paged. The n-th layers of all groups share their tensors."""
        places: list[KVCache] = []
        caches: dict[int, KVCache] = {}
        for number, layers in enumerate([group.layers for group in groups] or [range(len(self.blk))]):
            for place, layer in enumerate(layers):
                if place == len(places):
                    places.append(ops.new_cache(self.blk[layer].state, num_blocks, block_size, dtype, device))
                caches[layer] = replace(places[place], group=number)
        return [caches[layer] for layer in range(len(self.blk))]

    def attention_scale(self, key_length: int) -> float:
        """Of q k^T, where the file does not give it."""
        return 1.0 / math.sqrt(key_length)

    def prepare(self, device: torch.device) -> None:
        """Once after the tensors are there: the rotary tables, one for all layers that turn alike, and the fused layers."""
        for block in self.blk:
            rope = block.spec.attention.rope
            if rope not in self._rotary:
                inverse = inverse_frequencies(rope, self._divisors(rope))
                long = self.rope_factors_long is not None  # not every converter writes the type too
                scaling = replace(rope.scaling, type="longrope") if long else rope.scaling
                size = magnitude(scaling, self.config.context_length)
                self._rotary[rope] = RotaryTable(inverse, size, self.traits.interleaved_rope, device)
        ropes = list(self._rotary)
        self._stack = ops.stack([block.fused(ropes.index(block.spec.attention.rope)) for block in self.blk])

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """Writes the batch's keys and values to the caches; the hidden states after the final norm of the rows
        `batch.logit_rows`, (num_logits, E) float32."""
        x = self.token_embd(ops.pad_rows(batch.token_ids))
        if self.embedding_scale != 1.0:
            x.mul_(self.embedding_scale)
        if self._stack is not None and not batch.adapters:
            length = max(batch.context_lens, default=1)
            ropes = [table.turns(length) for table in self._rotary.values()]
            self._stack(x, batch, caches, ropes, self._temperature(batch.positions))
        else:
            step = self._step(batch, caches)
            for block, cache in zip(self.blk, caches, strict=True):
                x = block(x, step, cache)
        return self.output_norm(x.index_select(0, batch.logit_rows))

    __call__ = forward

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, V) float32."""
        out = self.output(hidden)
        return ops.softcap(out, self.config.final_softcap) if self.config.final_softcap else out

    def _step(self, batch: Batch, caches: Sequence[KVCache]) -> Step:
        positions = ops.pad_rows(batch.positions)
        length = max(batch.context_lens, default=1)
        rotary = {rope: table.rows(positions, length) for rope, table in self._rotary.items()}
        temperature = self._temperature(positions)
        rows = None if temperature is None else temperature.view(-1, 1, 1)
        plans = [ops.plan_attention(seen, caches[0]) for seen in batch.groups]
        return Step(plans, [seen.slot_mapping for seen in batch.groups], rotary, rows, batch.adapters)

    def _temperature(self, positions: Tensor) -> Tensor | None:
        """(n,): what queries are multiplied with by their position, for models that do so."""
        if not self.config.temperature_scale:
            return None
        steps = torch.floor(positions / self.config.temperature_length).add_(1.0).log_()
        return steps.mul_(self.config.temperature_scale).add_(1.0)

    def _rope_factors(self, name: str, shapes: Shapes) -> RopeFactors | None:
        """A layer for a tensor that divides rope's frequencies, where the file has it."""
        longrope = name != "rope_freqs" and self.config.ropes[0].scaling.type == "longrope"
        return RopeFactors(self.config.ropes[0].dims) if longrope or f"{name}.weight" in shapes else None

    def _divisors(self, rope: Rope) -> Tensor | None:
        """The long factors serve a model that was loaded for more than its original context, the short ones another."""
        factors = self.rope_freqs
        if self.rope_factors_long is not None:
            long = self.context_length > rope.scaling.original_context_length
            factors = self.rope_factors_long if long else self.rope_factors_short
        return None if factors is None else factors.weight

    def _layer_spec(self, layer: int, shapes: Shapes) -> LayerSpec:
        config = self.config
        return LayerSpec(
            embedding_length=config.embedding_length,
            norm_eps=config.norm_eps,
            post_norms=self.traits.post_norms,
            attention=self._attention_spec(layer, shapes),
            feed_forward=self._feed_forward_spec(layer, shapes),
        )

    def _attention_spec(self, layer: int, shapes: Shapes) -> AttentionSpec:
        config, prefix = self.config, f"blk.{layer}."
        fused = f"{prefix}attn_qkv.weight" in shapes
        named = ("attn_qkv",) * 3 if fused else ("attn_q", "attn_k", "attn_v")
        biases = [self.traits.qkv_bias or f"{prefix}{name}.bias" in shapes for name in named]
        return AttentionSpec(
            num_heads=config.num_heads[layer],
            num_kv_heads=config.num_kv_heads[layer],
            key_length=config.key_length[layer],
            value_length=config.value_length[layer],
            scale=config.attn_scale or self.attention_scale(config.key_length[layer]),
            softcap=config.attn_softcap,
            window=config.windows[layer],
            causal=config.causal,
            rope=config.ropes[layer],
            interleaved_rope=self.traits.interleaved_rope,
            fused_qkv=fused,
            qkv_bias=(biases[0], biases[1], biases[2]),
            output_bias=f"{prefix}attn_output.bias" in shapes,
            qk_norm=self.traits.qk_norm,
            sinks=f"{prefix}attn_sinks.weight" in shapes,
            query_temperature=config.temperature_scale != 0.0,
        )

    def _feed_forward_spec(self, layer: int, shapes: Shapes) -> FeedForwardSpec:
        config, prefix = self.config, f"blk.{layer}."
        length = config.feed_forward_length[layer]
        experts = None
        if f"{prefix}ffn_gate_inp.weight" in shapes:
            experts = ExpertsSpec(
                count=config.expert_count,
                used=config.expert_used_count,
                length=config.expert_feed_forward_length or length,
                gating=config.expert_gating,
                scale=config.expert_weights_scale,
                separate=f"{prefix}ffn_gate.0.weight" in shapes,
            )
        fused = shapes.get(f"{prefix}ffn_up.weight", (0,))[0] == 2 * length and f"{prefix}ffn_gate.weight" not in shapes
        return FeedForwardSpec(length, self.traits.activation, fused, experts)
