"""Architecture metadata of a GGUF file from a checkpoint's config.json, and the tensors that carry rope factors.

Knows the keys that `models/config.py` reads. Tokenizer metadata is not made here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ollamapy.convert.maps import HFConfig, NameMap, expert_count, head_length
from ollamapy.errors import UnsupportedModel
from ollamapy.models.config import DEFAULTS, Defaults

if TYPE_CHECKING:
    from torch import Tensor


def architecture_metadata(map: NameMap, config: HFConfig) -> dict[str, Any]:
    """`general.architecture` and the keys under its prefix."""
    rope = rope_parameters(config)
    dims = int(head_length(config) * rope.get("partial_rotary_factor", 1.0))
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_length(config),
        "attention.value_length": head_length(config),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": dims,
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling(config, rope),
        **_window(map.architecture, config),
        **_gemma(map.architecture, config),
        **_experts(config),
    }
    return {"general.architecture": map.architecture} | {f"{map.architecture}.{key}": value for key, value in values.items()}


def rope_parameters(config: HFConfig, layers: str = "full_attention") -> dict[str, Any]:
    """transformers 5's `rope_parameters`, of one kind of layers where it tells them apart; older configs in that form."""
    new = config.get("rope_parameters")
    if new is not None:
        return dict(new[layers]) if layers in new else dict(new)
    old = dict(config.get("rope_scaling") or {})
    old["rope_type"] = old.pop("type", old.get("rope_type", "default"))
    return {"rope_theta": config.get("rope_theta", 10_000.0), "partial_rotary_factor": 1.0, **old}


def rope_tensors(config: HFConfig) -> dict[str, Tensor]:
    """The divisors of inverse frequencies that a file carries as tensors: llama3's scaling, and longrope's factors."""
    import torch

    rope = rope_parameters(config)
    if rope.get("rope_type") == "longrope":
        names = ("long", "short")
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32) for name in names}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": torch.tensor(_llama3_divisors(rope, head_length(config)), dtype=torch.float32)}
    return {}


def _llama3_divisors(rope: dict[str, Any], dims: int) -> list[float]:
    """1 for wavelengths well within the original context, `factor` for those beyond it, smooth between."""
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    divisors = []
    for i in range(0, dims, 2):
        turns = original / (2.0 * math.pi * rope["rope_theta"] ** (i / dims))  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return divisors


def _scaling(config: HFConfig, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or config["max_position_embeddings"]
    if kind == "longrope":
        stretch = rope.get("factor") or config["max_position_embeddings"] / original
        factor = rope.get("attention_factor") or math.sqrt(1.0 + math.log(max(stretch, 1.0)) / math.log(original))
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(factor),
        }
    if kind != "yarn":
        raise UnsupportedModel(f'rope type "{kind}" has no place in GGUF')
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if rope.get("mscale_all_dim"):
        values["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
    elif rope.get("attention_factor"):
        own = 0.1 * math.log(rope["factor"]) + 1.0  # readers of GGUF multiply by it
        values["rope.scaling.attn_factor"] = rope["attention_factor"] / own
    if rope.get("llama_4_scaling_beta"):
        values["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    return values


def _window(architecture: str, config: HFConfig) -> dict[str, Any]:
    """The window, and which layers have it where that differs from what readers assume."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return {}
    count = config["num_hidden_layers"]
    types = config.get("layer_types")
    pattern = [kind == "sliding_attention" for kind in types] if types else [True] * count
    period = DEFAULTS.get(architecture, Defaults()).window_period
    assumed = [period == 0 or layer % period < period - 1 for layer in range(count)]
    return {"attention.sliding_window": window} | ({} if pattern == assumed else {"attention.sliding_window_pattern": pattern})


def _gemma(architecture: str, config: HFConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if architecture in ("gemma2", "gemma3"):
        values["attn_logit_softcapping"] = float(config.get("attn_logit_softcapping") or 0.0)
        values["final_logit_softcapping"] = float(config.get("final_logit_softcapping") or 0.0)
        if config["query_pre_attn_scalar"] != head_length(config):
            values["attention.scale"] = float(config["query_pre_attn_scalar"]) ** -0.5
    if architecture == "gemma3":
        values["rope.freq_base_swa"] = float(rope_parameters(config, "sliding_attention")["rope_theta"])
    return values


def _experts(config: HFConfig) -> dict[str, Any]:
    if not expert_count(config):
        return {}
    values = {"expert_count": expert_count(config), "expert_used_count": config["num_experts_per_tok"]}
    if config.get("moe_intermediate_size"):
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return values
