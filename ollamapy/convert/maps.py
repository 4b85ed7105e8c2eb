"""Name maps: Hugging Face checkpoint names -> GGUF names, and what happens to a tensor on the way. The only such maps.

A map is data: module names within a layer, and transforms by GGUF name. Knows no files; tensors come and go as values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ollamapy.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

HFConfig = Mapping[str, Any]
Transform = Callable[["Tensor", HFConfig], "Tensor"]

_LAYER_TENSOR = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class NameMap:
    """How one architecture's checkpoint becomes GGUF. Keys of `layer` are module names; experts' have no number."""

    architecture: str  # general.architecture
    layer: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)  # by the GGUF name without layer and ".weight"


def head_length(config: HFConfig) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (i, i + D / 2), as HF turns them, to pairs (2i, 2i + 1). Weights and biases alike."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _interleave_q(tensor: Tensor, config: HFConfig) -> Tensor:
    return _interleave(tensor, config["num_attention_heads"])


def _interleave_k(tensor: Tensor, config: HFConfig) -> Tensor:
    return _interleave(tensor, config["num_key_value_heads"])


def _plus_one(tensor: Tensor, config: HFConfig) -> Tensor:
    return tensor + 1.0


_ENDS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_PRE_FFN_NORM = {"post_attention_layernorm": "ffn_norm"}
_SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
}
_QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_INTERLEAVED: dict[str, Transform] = {"attn_q": _interleave_q, "attn_k": _interleave_k}
_NORMS = ("attn_norm", "ffn_norm", "output_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
_GEMMA_NORMS: dict[str, Transform] = dict.fromkeys(_NORMS, _plus_one)

_LLAMA = {**_ATTENTION, **_PRE_FFN_NORM, **_GATED_MLP}
MAPS: dict[str, NameMap] = {
    "GemmaForCausalLM": NameMap("gemma", _LLAMA, _GEMMA_NORMS),
    "Gemma2ForCausalLM": NameMap("gemma2", {**_ATTENTION, **_SANDWICH_NORMS, **_GATED_MLP}, _GEMMA_NORMS),
    "Gemma3ForCausalLM": NameMap("gemma3", {**_ATTENTION, **_QK_NORM, **_SANDWICH_NORMS, **_GATED_MLP}, _GEMMA_NORMS),
    "LlamaForCausalLM": NameMap("llama", _LLAMA, _INTERLEAVED),
    "MistralForCausalLM": NameMap("llama", _LLAMA, _INTERLEAVED),
    "Ministral3ForCausalLM": NameMap("mistral3", _LLAMA, _INTERLEAVED),
    "MixtralForCausalLM": NameMap("llama", {**_ATTENTION, **_PRE_FFN_NORM, **_MIXTRAL_EXPERTS}, _INTERLEAVED),
    "Phi3ForCausalLM": NameMap("phi3", {**_PHI3, **_PRE_FFN_NORM}),
    "Qwen2ForCausalLM": NameMap("qwen2", _LLAMA),
    "Qwen3ForCausalLM": NameMap("qwen3", {**_LLAMA, **_QK_NORM}),
    "Qwen3MoeForCausalLM": NameMap("qwen3moe", {**_LLAMA, **_QK_NORM, **_QWEN_EXPERTS}),
}
"""Class name of a checkpoint's config.json (`architectures[0]`) -> its map."""


def gguf_name(map: NameMap, name: str) -> tuple[str, int | None]:
    """GGUF name of a checkpoint tensor, and which expert of it this is. Raises UnsupportedModel for a name not in the map."""
    if name == "lm_head.weight":
        return "output.weight", None
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None:
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        if stem in _ENDS:
            return f"{_ENDS[stem]}.{kind}", None
    else:
        layer, module, kind = match.groups()
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            module = f"{expert[1]}.{expert[3]}"
        if module in map.layer:
            return f"blk.{layer}.{map.layer[module]}.{kind}", int(expert[2]) if expert is not None else None
    raise UnsupportedModel(f"no GGUF name for the tensor {name} of a {map.architecture} checkpoint")


def convert_tensors(map: NameMap, config: HFConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and values, in the order of the input; experts become one tensor when their last one has come."""
    import torch

    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        target, expert = gguf_name(map, name)
        stem = target.rpartition(".")[0].split(".")[-1]
        transform = map.transforms.get(stem)
        tensor = tensor if transform is None else transform(tensor, config)
        if expert is None:
            yield target, tensor
            continue
        held = experts.setdefault(target, {})
        held[expert] = tensor
        if len(held) == expert_count(config):
            yield target, torch.stack([held[index] for index in range(len(held))])
            del experts[target]
    if experts:
        raise UnsupportedModel(f"the checkpoint lacks experts of {', '.join(sorted(experts))}")


def expert_count(config: HFConfig) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)
