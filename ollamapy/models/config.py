"""ModelConfig: what a GGUF file's metadata says about a model, as plain frozen values. No torch.

What an architecture fixes without saying so in metadata is in its model file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.dialect import normalise
from ollamapy.layers.spec import Rope, RopeScaling
from ollamapy.models import ARCHITECTURES
from ollamapy.models.keys import Keys

MAX_LAYERS = MAX_EXPERTS = 4096  # more than any model has; a bound for what is made per layer and expert
Pooling = Literal["none", "mean", "cls", "last", "rank"]
_POOLING: tuple[Pooling, ...] = ("none", "mean", "cls", "last", "rank")  # by number, as llama.cpp counts them
_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
Gating = Literal["softmax", "sigmoid", "softmax_selected"]
_GATING: dict[int, Gating] = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_selected"}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the loaders of an architecture assume where the file has no key."""

    window_period: int = 0  # 0: every layer has the window; p: the last of each p layers has none
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    scaled_windows: bool = True  # rope scaling holds for layers with a window too


DEFAULTS = {
    "gemma2": Defaults(window_period=2, attn_softcap=50.0, final_softcap=30.0),
    "gemma3": Defaults(window_period=6, scaled_windows=False),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Tuples have one entry per layer. A window of 0 is full attention; else the last `window` tokens are seen."""

    architecture: str
    name: str
    context_length: int
    embedding_length: int
    block_count: int
    vocab_size: int  # entries of the tokenizer; the embedding matrix may have other rows
    feed_forward_length: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    key_length: tuple[int, ...]
    value_length: tuple[int, ...]
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    norm_eps: float
    causal: bool
    pooling_type: Pooling
    attn_scale: float  # 0: 1 / sqrt(key_length)
    attn_softcap: float  # 0: none
    final_softcap: float  # 0: none
    temperature_scale: float  # of queries at long positions; 0: none
    temperature_length: int
    expert_count: int
    expert_used_count: int
    expert_feed_forward_length: int
    expert_gating: Gating
    expert_weights_scale: float  # 0: none

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ModelConfig:
        """Raises UnsupportedModel for an architecture that is not built, or for keys that are missing or make no sense."""
        metadata, _ = normalise(metadata, {})
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise UnsupportedModel("the model file does not say its architecture (general.architecture)")
        if architecture not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise UnsupportedModel(f'unsupported architecture "{architecture}" (supported: {supported})')
        keys = Keys(metadata, architecture)
        shape = _Shape.read(keys)
        defaults = DEFAULTS.get(architecture, Defaults())
        windows = _windows(keys, shape.layers, defaults)
        lengths = _head_lengths(keys, shape, windows)
        causal = keys.boolean("attention.causal", default=True)
        return cls(
            architecture=architecture,
            name=str(metadata.get("general.name", "")),
            context_length=shape.context_length,
            embedding_length=shape.embedding_length,
            block_count=shape.layers,
            vocab_size=keys.integer("vocab_size", default=keys.array_length("tokenizer.ggml.tokens")),
            feed_forward_length=keys.per_layer("feed_forward_length", shape.layers, default=0),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            key_length=lengths[0],
            value_length=lengths[1],
            windows=windows,
            ropes=_ropes(keys, shape, windows, lengths[0], defaults),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            causal=causal,
            pooling_type=_pooling(keys, causal),
            attn_scale=keys.number("attention.scale", default=0.0),
            attn_softcap=keys.number("attn_logit_softcapping", default=defaults.attn_softcap),
            final_softcap=keys.number("final_logit_softcapping", default=defaults.final_softcap),
            temperature_scale=keys.number("attention.temperature_scale", default=0.0),
            temperature_length=keys.integer(
                "attention.temperature_length", "rope.scaling.original_context_length", default=shape.context_length
            )
            or shape.context_length,
            **_experts(keys),
        )

    def kv_bytes_per_token(self, block_bytes: int, block_size: int = 1) -> int:
        """Bytes that one token of one sequence takes in the KV cache, all layers together, when `block_size` elements of a head
        take `block_bytes`."""
        layers = zip(self.num_kv_heads, self.key_length, self.value_length, strict=True)
        return block_bytes * sum(heads * (key // block_size + value // block_size) for heads, key, value in layers)


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    context_length: int
    embedding_length: int
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]

    @classmethod
    def read(cls, keys: Keys) -> _Shape:
        layers = keys.integer("block_count")
        if not 1 <= layers <= MAX_LAYERS:
            raise UnsupportedModel(f"block_count is {layers}; from 1 to {MAX_LAYERS} layers can be run")
        num_heads = keys.per_layer("attention.head_count", layers)
        num_kv_heads = num_heads
        if "attention.head_count_kv" in keys:
            num_kv_heads = keys.per_layer("attention.head_count_kv", layers)
        for heads, kv_heads in zip(num_heads, num_kv_heads, strict=True):
            if not heads or not kv_heads or heads % kv_heads:
                raise UnsupportedModel(f"{heads} attention heads cannot share {kv_heads} key-value heads")
        shape = cls(layers, keys.integer("context_length"), keys.integer("embedding_length"), num_heads, num_kv_heads)
        if not shape.context_length or not shape.embedding_length:
            raise UnsupportedModel("context_length and embedding_length must not be 0")
        return shape


def _windows(keys: Keys, layers: int, defaults: Defaults) -> tuple[int, ...]:
    """Window of each layer. The pattern is a period (the last layer of each is full) or a boolean per layer."""
    window = keys.integer("attention.sliding_window", default=0)
    if keys.is_list("attention.sliding_window_pattern"):
        windowed = keys.flags("attention.sliding_window_pattern", layers)
    else:
        period = keys.integer("attention.sliding_window_pattern", default=defaults.window_period)
        windowed = tuple(period == 0 or layer % period < period - 1 for layer in range(layers))
    return tuple(window if has_window else 0 for has_window in windowed)


def _head_lengths(keys: Keys, shape: _Shape, windows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Key and value lengths of each layer's heads."""
    standard = shape.embedding_length // shape.num_heads[0]
    key = keys.integer("attention.key_length", default=standard)
    value = keys.integer("attention.value_length", default=standard)
    local_key = keys.integer("attention.key_length_swa", default=key)
    local_value = keys.integer("attention.value_length_swa", default=value)
    if not all((key, value, local_key, local_value)):
        raise UnsupportedModel("attention heads of length 0")
    return tuple(local_key if w else key for w in windows), tuple(local_value if w else value for w in windows)


def _ropes(
    keys: Keys, shape: _Shape, windows: tuple[int, ...], key_length: tuple[int, ...], defaults: Defaults
) -> tuple[Rope, ...]:
    base = keys.number("rope.freq_base", default=10_000.0)
    scaling = _scaling(keys, shape.context_length)
    local_base = keys.number("rope.freq_base_swa", default=base)
    local_scaling = scaling if defaults.scaled_windows else RopeScaling()
    ropes = []
    for window, length in zip(windows, key_length, strict=True):
        dims = keys.integer("rope.dimension_count", default=length)
        if window:
            dims = keys.integer("rope.dimension_count_swa", default=dims)
        if dims % 2 or not 0 < dims <= length:
            raise UnsupportedModel(f"rope.dimension_count {dims} does not fit heads of {length}")
        ropes.append(Rope(dims, local_base, local_scaling) if window else Rope(dims, base, scaling))
    if min(base, local_base) <= 1:
        raise UnsupportedModel("rope.freq_base must be above 1")
    return tuple(ropes)


def _scaling(keys: Keys, context_length: int) -> RopeScaling:
    factor = keys.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
    type = keys.string("rope.scaling.type", default="linear" if factor != 1.0 else "none")
    if type not in _SCALING_TYPES:
        raise UnsupportedModel(f'unknown rope.scaling.type "{type}" (known: {", ".join(_SCALING_TYPES)})')
    scaling = RopeScaling(
        type,
        factor,
        keys.integer("rope.scaling.original_context_length", default=context_length) or context_length,
        keys.number("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", default=0.0),
        keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        keys.number("rope.scaling.yarn_log_multiplier", default=0.0),
    )
    if min(factor, scaling.beta_fast, scaling.beta_slow) <= 0:
        raise UnsupportedModel("rope.scaling: factor, yarn_beta_fast and yarn_beta_slow must be above 0")
    return scaling


def _pooling(keys: Keys, causal: bool) -> Pooling:
    number = keys.integer("pooling_type", default=_POOLING.index("last" if causal else "mean"))
    if number >= len(_POOLING):
        raise UnsupportedModel(f"unknown pooling_type {number}")
    return _POOLING[number]


def _experts(keys: Keys) -> dict[str, Any]:
    count = keys.integer("expert_count", default=0)
    used = keys.integer("expert_used_count", default=0)
    if count > MAX_EXPERTS or (count and not 1 <= used <= count):
        raise UnsupportedModel(f"{used} of {count} experts cannot be run; up to {MAX_EXPERTS} can")
    gating = keys.integer("expert_gating_func", default=1)
    if gating not in _GATING:
        raise UnsupportedModel(f"unknown expert_gating_func {gating}")
    return {
        "expert_count": count,
        "expert_used_count": used,
        "expert_feed_forward_length": keys.integer("expert_feed_forward_length", default=0),
        "expert_gating": _GATING[gating],
        "expert_weights_scale": keys.number("expert_weights_scale", default=0.0),
    }
