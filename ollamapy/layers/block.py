"""The decoder block: attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor

from ollamapy.engine.batch import KVCache
from ollamapy.layers.attention import Attention, Step
from ollamapy.layers.layer import Module
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

    def __call__(self, x: Tensor, step: Step, cache: KVCache) -> Tensor:
        x.add_(self.post_attention_norm(self.attention(self.attn_norm(x), step, cache)))
        return x.add_(self.post_ffw_norm(self.feed_forward(self.ffn_norm(x))))
