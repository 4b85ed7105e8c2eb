"""Specs: what one decoder layer is made of, as frozen values. No torch.

A spec is built once at load, from metadata and from which tensors the file has; the layers choose their callables by it, so
that no forward pass asks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How positions beyond the trained context are reached. `factor` 1 with type "none": not at all."""

    type: str = "none"  # none | linear | yarn | longrope
    factor: float = 1.0
    original_context_length: int = 0
    attn_factor: float = 0.0  # multiplies cos and sin; 0: the type's own rule alone
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0  # of the yarn magnitude; 0: magnitude 0.1 ln(factor) + 1


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one layer: the first `dims` elements of each head turn."""

    dims: int
    base: float
    scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    key_length: int
    value_length: int
    scale: float  # of q k^T
    softcap: float  # of scores; 0: none
    window: int  # 0: none
    causal: bool
    rope: Rope
    interleaved_rope: bool  # pairs (2i, 2i + 1); else (i, i + n_rot / 2)
    fused_qkv: bool  # one tensor attn_qkv with the rows of q, k and v
    qkv_bias: tuple[bool, bool, bool]  # all equal when fused
    output_bias: bool
    qk_norm: bool  # RMSNorm of each head of q and k before rope
    sinks: bool  # an extra logit per head
    query_temperature: bool  # queries grow with the logarithm of their position


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    count: int
    used: int
    length: int
    gating: Literal["softmax", "sigmoid", "softmax_selected"]
    scale: float  # of the chosen experts' weights; 0: none
    separate: bool  # a tensor per expert, as very old files have


@dataclass(frozen=True, slots=True)
class FeedForwardSpec:
    length: int
    activation: Activation
    fused_gate: bool  # ffn_up holds the rows of the gate, then those of up
    experts: ExpertsSpec | None  # None: dense


@dataclass(frozen=True, slots=True)
class LayerSpec:
    embedding_length: int
    norm_eps: float
    post_norms: bool  # norms of each branch's output before it is added
    attention: AttentionSpec
    feed_forward: FeedForwardSpec
