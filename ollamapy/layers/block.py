"""The decoder block: attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import KVCache, LayerState
from ollamapy.layers.attention import Attention, Step
from ollamapy.layers.layer import Module
from ollamapy.layers.linear import Linear
from ollamapy.layers.mlp import FusedGatedMLP, GatedMLP
from ollamapy.layers.moe import MixtureOfExperts
from ollamapy.layers.norm import RMSNorm, identity
from ollamapy.layers.spec import LayerSpec


class DecoderBlock(Module):
    """(n, E) -> (n, E), in place. `index` is the layer's number, for the names of its tensors."""

    def __init__(self, spec: LayerSpec, index: int) -> None:
        length, eps = spec.embedding_length, spec.norm_eps
        self.spec = spec
        self.attn_norm = RMSNorm(length, eps)
        self.attention = Attention(spec.attention, length, eps)
        self.post_attention_norm = RMSNorm(length, eps) if spec.post_norms else identity
        self.ffn_norm = RMSNorm(length, eps)
        self.feed_forward = self._feed_forward(index)
        self.post_ffw_norm = RMSNorm(length, eps) if spec.post_norms else identity

    def _feed_forward(self, index: int) -> GatedMLP | FusedGatedMLP | MixtureOfExperts:
        spec, length = self.spec.feed_forward, self.spec.embedding_length
        if spec.experts is not None:
            return MixtureOfExperts(spec, length, f"blk.{index}.")
        return FusedGatedMLP(spec, length) if spec.fused_gate else GatedMLP(spec, length)

    @property
    def state(self) -> LayerState:
        """What the layer keeps per token."""
        spec = self.spec.attention
        return LayerState(spec.num_kv_heads, spec.key_length, spec.value_length, spec.window)

    def fused(self, rope_index: int) -> ops.DecoderLayer:
        """The layer as `ops.stack` takes it, with the index of its rotary table."""
        spec = self.spec.attention
        matrices = {**self.attention.matrices(), **self.feed_forward.matrices()}
        biases = {name: matrix.bias for name, matrix in matrices.items() if isinstance(matrix, Linear)}
        norms = {
            "attn_norm": self.attn_norm,
            "post_attn_norm": self.post_attention_norm,
            "ffn_norm": self.ffn_norm,
            "post_ffn_norm": self.post_ffw_norm,
            "q_norm": self.attention.attn_q_norm,
            "k_norm": self.attention.attn_k_norm,
        }
        vectors = {name: norm.weight for name, norm in norms.items() if isinstance(norm, RMSNorm)}
        if spec.sinks:
            vectors["sinks"] = self.attention.attn_sinks.weight
        return ops.DecoderLayer(
            weights={name: matrix.weight.data for name, matrix in matrices.items()},
            biases={name: bias for name, bias in biases.items() if bias is not None},
            vectors=vectors,
            num_heads=spec.num_heads,
            state=self.state,
            scale=spec.scale,
            softcap=spec.softcap,
            causal=spec.causal,
            rope_index=rope_index,
            rope_dims=spec.rope.dims,
            rope_interleaved=spec.interleaved_rope,
            activation=self.spec.feed_forward.activation,
            temper=spec.query_temperature,
            eps=self.spec.norm_eps,
            routing=self.feed_forward.routing if isinstance(self.feed_forward, MixtureOfExperts) else None,
        )

    def __call__(self, x: Tensor, step: Step, cache: KVCache) -> Tensor:
        x.add_(self.post_attention_norm(self.attention(self.attn_norm(x), step, cache)))
        return x.add_(self.post_ffw_norm(self.feed_forward(self.ffn_norm(x), step.adapters)))
