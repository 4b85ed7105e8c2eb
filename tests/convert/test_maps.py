"""Name maps and metadata: what parity tests cannot show, because both sides would be wrong together or never see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ollamapy.convert.maps import MAPS, convert_tensors, gguf_name
from ollamapy.convert.metadata import architecture_metadata, rope_parameters, rope_tensors
from ollamapy.errors import UnsupportedModel
from ollamapy.models import ARCHITECTURES

CONFIG: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def test_every_architecture_has_a_checkpoint_class() -> None:
    assert {map.architecture for map in MAPS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("cls", "name", "expected"),
    [
        ("LlamaForCausalLM", "model.embed_tokens.weight", ("token_embd.weight", None)),
        ("LlamaForCausalLM", "lm_head.weight", ("output.weight", None)),
        ("LlamaForCausalLM", "model.norm.weight", ("output_norm.weight", None)),
        ("LlamaForCausalLM", "model.layers.11.self_attn.q_proj.bias", ("blk.11.attn_q.bias", None)),
        ("LlamaForCausalLM", "model.layers.3.post_attention_layernorm.weight", ("blk.3.ffn_norm.weight", None)),
        ("Gemma2ForCausalLM", "model.layers.3.post_attention_layernorm.weight", ("blk.3.post_attention_norm.weight", None)),
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.experts.7.w2.weight", ("blk.0.ffn_down_exps.weight", 7)),
    ],
)
def test_names(cls: str, name: str, expected: tuple[str, int | None]) -> None:
    assert gguf_name(MAPS[cls], name) == expected


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary.weight", "visual.patch.weight", "model.layers.x.mlp.weight"])
def test_a_name_without_a_place_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="no GGUF name for the tensor") as error:
        gguf_name(MAPS["LlamaForCausalLM"], name)
    assert name in str(error.value)


def test_query_rows_from_halves_to_pairs() -> None:
    rows = torch.arange(4 * 6.0).view(24, 1).expand(24, 3)  # 4 heads of 6
    (_, got), *_ = convert_tensors(MAPS["LlamaForCausalLM"], CONFIG, [("model.layers.0.self_attn.q_proj.weight", rows)])
    assert got[:, 0].view(4, 6)[1].tolist() == [6.0, 9.0, 7.0, 10.0, 8.0, 11.0]
    bias = next(iter(convert_tensors(MAPS["LlamaForCausalLM"], CONFIG, [("model.layers.0.self_attn.k_proj.bias", rows[:, 0])])))
    assert bias[1].view(2, 12)[0].tolist() == [0.0, 6.0, 1.0, 7.0, 2.0, 8.0, 3.0, 9.0, 4.0, 10.0, 5.0, 11.0]


def test_missing_experts_are_named() -> None:
    config = CONFIG | {"num_experts": 3}
    tensors = [(f"model.layers.0.mlp.experts.{i}.up_proj.weight", torch.zeros(2, 2)) for i in (0, 2)]
    with pytest.raises(UnsupportedModel, match=r"lacks experts of blk\.0\.ffn_up_exps\.weight"):
        list(convert_tensors(MAPS["Qwen3MoeForCausalLM"], config, tensors))


def test_configs_from_before_rope_parameters() -> None:
    old = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    old |= {"rope_theta": 7000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_parameters(old) == {
        "rope_theta": 7000.0,
        "partial_rotary_factor": 1.0,
        "rope_type": "linear",
        "factor": 2.0,
    }
    metadata = architecture_metadata(MAPS["LlamaForCausalLM"], old)
    assert metadata["llama.rope.freq_base"] == 7000.0
    assert metadata["llama.rope.scaling.factor"] == 2.0
    assert metadata["llama.attention.key_length"] == 16  # hidden_size / heads


def test_llama3_divisors() -> None:
    """1 where a pair turns often within the original context, the factor where it turns less than once."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = CONFIG | {"head_dim": 128, "rope_parameters": rope | {"original_max_position_embeddings": 8192}}
    divisors = rope_tensors(config)["rope_freqs.weight"]
    assert divisors.shape == (64,)
    assert divisors[0] == 1.0 and divisors[-1] == 8.0
    assert (divisors.diff() >= 0).all() and ((divisors > 1.0) & (divisors < 8.0)).any()


def test_windows_that_readers_would_assume_are_not_spelled_out() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    config = CONFIG | {"sliding_window": 9, "layer_types": types, "query_pre_attn_scalar": 16}
    keys = architecture_metadata(MAPS["Gemma2ForCausalLM"], config)
    assert keys["gemma2.attention.sliding_window"] == 9 and "gemma2.attention.sliding_window_pattern" not in keys
    keys = architecture_metadata(MAPS["Gemma2ForCausalLM"], config | {"layer_types": types[::-1]})
    assert keys["gemma2.attention.sliding_window_pattern"] == [False, True, False, True]
    unused = architecture_metadata(MAPS["Qwen2ForCausalLM"], config | {"use_sliding_window": False})
    assert not any("sliding" in key for key in unused)


def test_a_rope_type_without_a_place_is_named() -> None:
    config = CONFIG | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match='rope type "dynamic"'):
        architecture_metadata(MAPS["LlamaForCausalLM"], config)
