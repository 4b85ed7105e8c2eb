"""Decoder: the model that most architectures are. An architecture's file says how its `Traits` differ, and little else.

Token ids in, hidden states and logits out. Knows no text, no sampling, no scheduling, and no file format: tensors come
from `load.py` by the names that the module tree spells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.protocol import LayerGroup, LayerSpan
from ollamapy.layers.block import DecoderBlock
from ollamapy.layers.embedding import Embedding
from ollamapy.layers.layer import Module
from ollamapy.layers.linear import Linear
from ollamapy.layers.norm import RMSNorm
from ollamapy.layers.rope import RopeFactors, RotaryTable, inverse_frequencies, magnitude
from ollamapy.layers.spec import Activation, AttentionSpec, ExpertsSpec, FeedForwardSpec, LayerSpec, Rope
from ollamapy.models.config import ModelConfig
from ollamapy.models.stage import Stage

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
        self.weight_bytes = self.vram_bytes = 0  # measured by load.py; the second: of those, on GPUs
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
        self._stages: list[Stage] = []
        self.place(torch.device("cpu"))

    def new_caches(
        self,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        groups: Sequence[LayerGroup] = (),
    ) -> list[KVCache]:
        """What each layer keeps per token, paged, on its device. The n-th layers of all groups share their tensors, so groups
        are for models on one device."""
        assert len(groups) <= 1 or len({device for _, device in self.spans}) == 1
        places: list[KVCache] = []
        caches: dict[int, KVCache] = {}
        for number, layers in enumerate([group.layers for group in groups] or [range(len(self.blk))]):
            for place, layer in enumerate(layers):
                if place == len(places):
                    places.append(self._new_cache(layer, num_blocks, block_size, dtype))
                caches[layer] = replace(places[place], group=number)
        return [caches[layer] for layer in range(len(self.blk))]

    def _new_cache(self, layer: int, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
        device = self.device_of(layer)
        ops.switch(device)
        try:
            return ops.new_cache(self.blk[layer].state, num_blocks, block_size, dtype, device)
        finally:
            ops.switch(self.device)

    def attention_scale(self, key_length: int) -> float:
        """Of q k^T, where the file does not give it."""
        return 1.0 / math.sqrt(key_length)

    def place(self, device: torch.device, spans: Sequence[LayerSpan] = (), longest: int = 0) -> None:
        """Before the tensors are loaded: the embedding, the head and what belongs to no layer go to `device`, layers to those
        of `spans`, or there too. No sequence will have more tokens than `longest`; 0: than `context_length`."""
        self.device, self._longest = device, max(longest, self.context_length)
        starts = [0, *accumulate(span.num_layers for span in spans)]
        self.spans = [
            (range(start, start + span.num_layers), torch.device(span.device))
            for start, span in zip(starts, spans, strict=False)
            if span.num_layers
        ] or [(range(len(self.blk)), device)]
        assert self.spans[-1][0].stop == len(self.blk), "spans are not of this model"

    def device_of(self, layer: int) -> torch.device:
        return next(device for layers, device in self.spans if layer in layers)

    def prepare(self) -> None:
        """Once after the tensors are there: the rotary tables of each device, one for layers that turn alike, and stages."""
        made: dict[torch.device, dict[Rope, RotaryTable]] = {}
        for layers, device in self.spans:
            if device not in made:
                made[device] = {rope: self._rotary_table(rope, device) for rope in self._ropes()}
            self._stages.append(Stage(self.blk, layers, device, made[device], self._temperature))
        ops.switch(self.device)

    def _ropes(self) -> list[Rope]:
        return list(dict.fromkeys(block.spec.attention.rope for block in self.blk))

    def _rotary_table(self, rope: Rope, device: torch.device) -> RotaryTable:
        inverse = inverse_frequencies(rope, self._divisors(rope))
        long = self.rope_factors_long is not None  # not every converter writes the type too
        scaling = replace(rope.scaling, type="longrope") if long else rope.scaling
        factor = magnitude(scaling, self.config.context_length)
        return RotaryTable(inverse, factor, self.traits.interleaved_rope, device, self._longest)

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """Writes the batch's keys and values to the caches; the hidden states after the final norm of the rows
        `batch.logit_rows`, (num_logits, E) float32."""
        x = self.token_embd(ops.pad_rows(batch.token_ids))
        if self.embedding_scale != 1.0:
            x.mul_(self.embedding_scale)
        seen = batch
        for stage in self._stages:
            if stage.device != self.device or seen is not batch:
                x = batch.move(x[: batch.num_tokens], stage.device)  # first: what is recorded ends on the device it began on
                ops.switch(stage.device)
                x = ops.pad_rows(x)
                seen = batch if stage.device == self.device else batch.to(stage.device)
            x = stage(x, seen, caches)
        if seen is not batch:
            x = batch.move(x, self.device)
            ops.switch(self.device)
        every = batch.logit_rows.shape[0] == x.shape[0]  # rows are wanted once, in their order
        return self.output_norm(x if every else x.index_select(0, batch.logit_rows))

    __call__ = forward

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, V) float32."""
        out = self.output(hidden)
        return ops.softcap(out, self.config.final_softcap) if self.config.final_softcap else out

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
