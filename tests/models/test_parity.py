"""Every architecture against transformers: tiny random models, float32, over a paged cache in all the ways a batch can come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollamapy.models.decoder import Decoder
from tests.models.paged import Paged
from tests.models.tiny import Tiny, load_tiny, write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-5  # of max|difference| / max|reference|; observed 3e-7 to 2e-6
LONG, SHORT = 48, 33  # tokens: three windows of 16, and blocks that end in the middle


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


def _factors(first: float) -> list[float]:
    return [first + 0.1 * i for i in range(6)]  # n_rot / 2 of heads of 16, a quarter of which does not turn


WINDOWED_QWEN2 = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
TEMPERED_YARN = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3
)
LONGROPE = _rope("longrope", partial_rotary_factor=0.75, short_factor=_factors(1.0), long_factor=_factors(3.0))
LONGROPE["head_dim"] = 16  # transformers checks the factors against hidden_size / heads

CASES = {
    "llama-bias-tied": Tiny("LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-llama3": Tiny(
        "LlamaForCausalLM",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-linear": Tiny("LlamaForCausalLM", _rope("linear", factor=4.0)),
    "llama-yarn": Tiny("LlamaForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-one-kv-head": Tiny("LlamaForCausalLM", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral-window": Tiny("MistralForCausalLM", {"sliding_window": 16}),
    "mixtral-window": Tiny("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16}),
    "qwen2": Tiny("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": Tiny("Qwen2ForCausalLM", WINDOWED_QWEN2),
    "qwen3": Tiny("Qwen3ForCausalLM", {}),
    "qwen3-yarn": Tiny(  # long enough that some pairs keep their frequency: the lower end of the ramp
        "Qwen3ForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=4096, attention_factor=1.3)
    ),
    "qwen3moe": Tiny(
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma": Tiny("GemmaForCausalLM", {}),
    "gemma2-window": Tiny("Gemma2ForCausalLM", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma2-caps": Tiny(
        "Gemma2ForCausalLM",
        {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},  # 50 would not show
    ),
    "gemma2-scale": Tiny("Gemma2ForCausalLM", {"sliding_window": 16, "query_pre_attn_scalar": 100}),
    "gemma3-window": Tiny(
        "Gemma3ForCausalLM",
        {"sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    ),
    "mistral3": Tiny("Ministral3ForCausalLM", TEMPERED_YARN),
    "phi3": Tiny("Phi3ForCausalLM", {}),
    "phi3-window-partial": Tiny("Phi3ForCausalLM", {"sliding_window": 16, **_rope("default", partial_rotary_factor=0.75)}),
    "phi3-longrope-short": Tiny("Phi3ForCausalLM", {**LONGROPE, "original_max_position_embeddings": 256}, context_length=64),
    "phi3-longrope-long": Tiny("Phi3ForCausalLM", {**LONGROPE, "original_max_position_embeddings": 24}),
}


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _reference(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, tmp_path: Path) -> None:
    """Plain torch, and the C++ kernels: float32 weights take no part of what these lose on quantized ones."""
    reference, path = write_tiny(CASES[name], tmp_path)
    long, short = _ids(LONG, 1), _ids(SHORT, 2)
    expected = _reference(reference, long), _reference(reference, short)
    for kernels, block_size in (("reference", 8), ("csrc", 16)):
        model = load_tiny(CASES[name], path, kernels)
        errors = _errors(model, block_size, long, short, expected)
        print(f"parity {name} {kernels}: " + ", ".join(f"{way} {error:.1e}" for way, error in errors.items()))
        assert max(errors.values()) <= LIMIT, (kernels, errors)


def _errors(
    model: Decoder, block_size: int, long: list[int], short: list[int], expected_both: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Of each way to feed the same tokens."""
    expected, expected_short = expected_both
    errors = {}
    errors["prefill"] = _error(Paged(model).logits({"a": long})["a"], expected)

    paged = Paged(model)
    steps = [paged.logits({"a": long[:20]})["a"]]
    steps += [paged.logits({"a": [token]})["a"] for token in long[20:]]
    errors["decode"] = _error(torch.cat(steps), expected)

    both = Paged(model).logits({"b": short, "a": long})
    errors["batch"] = max(_error(both["a"], expected), _error(both["b"], expected_short))

    paged = Paged(model, block_size=block_size)
    parts: dict[str, list[Tensor]] = {"a": [], "b": []}
    for fed in ({"a": long[:7]}, {"a": long[7:30], "b": short[:1]}, {"b": short[1:32], "a": long[30:31]}):
        for key, logits in paged.logits(fed).items():
            parts[key].append(logits)
    for key, logits in paged.logits({"a": long[31:], "b": short[32:]}).items():
        parts[key].append(logits)
    errors["chunks"] = max(_error(torch.cat(parts["a"]), expected), _error(torch.cat(parts["b"]), expected_short))
    return errors
