"""Ollama's own converter spells some keys and tensor names otherwise than llama.cpp: tables from its spelling to the other.

Renames and fills in what those files leave out; knows nothing of what a model does with it. A file that already has
llama.cpp's spelling passes through unchanged, so `normalise` is applied to every file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ollamapy.gguf.metadata import Metadata
from ollamapy.gguf.reader import TensorInfo

ARCHITECTURES = {
    "gptoss": "gpt-oss",
    "qwen25vl": "qwen2vl",
    "olmo3": "olmo2",
    "glm4moelite": "deepseek2",
    "deepseekocr": "deepseek2-ocr",
}
"""`general.architecture` of Ollama's files -> llama.cpp's. The keys' prefix follows."""

KEYS: dict[str, dict[str, str]] = {
    "gemma3": {
        "rope.global.freq_base": "rope.freq_base",
        "rope.local.freq_base": "rope.freq_base_swa",
    },
    "gemma-embedding": {
        "rope.global.freq_base": "rope.freq_base",
        "rope.local.freq_base": "rope.freq_base_swa",
    },
    "mistral3": {
        "rope.scaling.beta_fast": "rope.scaling.yarn_beta_fast",
        "rope.scaling.beta_slow": "rope.scaling.yarn_beta_slow",
        "rope.scaling.mscale_all_dim": "rope.scaling.yarn_log_multiplier",
        "rope.scaling_beta": "attention.temperature_scale",
    },
}
"""Architecture (llama.cpp's name) -> key without prefix -> llama.cpp's."""

TENSORS: dict[str, list[tuple[re.Pattern[str], str]]] = {
    "gpt-oss": [
        (re.compile(r"(blk\.\d+)\.attn_out\.(weight|bias)"), r"\1.attn_output.\2"),
        (re.compile(r"(blk\.\d+)\.attn_sinks"), r"\1.attn_sinks.weight"),
        (re.compile(r"(blk\.\d+)\.ffn_norm\.weight"), r"\1.post_attention_norm.weight"),
    ],
    "gemma-embedding": [
        (re.compile(r"norm\.weight"), "output_norm.weight"),
        (re.compile(r"dense\.0\.weight"), "dense_2.weight"),
        (re.compile(r"dense\.1\.weight"), "dense_3.weight"),
    ],
    "lfm2": [(re.compile(r"output_norm\.weight"), "token_embd_norm.weight")],
}
for _architecture in ("qwen35", "qwen35moe", "qwen3next"):
    TENSORS[_architecture] = [(re.compile(r"(blk\.\d+)\.ssm_dt"), r"\1.ssm_dt.bias")]
"""Architecture -> (whole tensor name, llama.cpp's)."""


class Overlay(Mapping[str, Any]):
    """A file's metadata with some keys changed or added; everything else, arrays too, stays undecoded underneath."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._base = base
        self._changed: dict[str, Callable[[], Any]] = {}
        self._removed: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key in self._changed:
            return self._changed[key]()
        if key in self._removed:
            raise KeyError(key)
        return self._base[key]

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._base if key not in self._removed and key not in self._changed)
        yield from self._changed

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self._changed or (key in self._base and key not in self._removed)

    def set(self, key: str, value: Any) -> None:
        self._changed[key] = lambda: value

    def default(self, key: str, value: Any) -> None:
        if key not in self:
            self.set(key, value)

    def rename(self, old: str, new: str) -> None:
        """The value under `new`; `new` wins where the file has both."""
        if old not in self:
            return
        getter = self._changed.pop(old, None) or (lambda: self._base[old])
        if new not in self:
            self._changed[new] = getter
        self._removed.add(old)

    def cut(self, key: str, length: int) -> None:
        self._changed[key] = lambda: self._base[key][:length]

    def array_length(self, key: str) -> int:
        """Elements of an array; it is decoded only where this or a layer below has changed it."""
        if key in self._changed or not isinstance(self._base, Metadata | Overlay):
            return len(self.get(key, ()))
        return 0 if key in self._removed else self._base.array_length(key) or 0


def normalise(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[Mapping[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors under llama.cpp's names. `TensorInfo.name` stays the file's: it is what `GGUFFile.data` takes."""
    result = Overlay(metadata)
    given = str(metadata.get("general.architecture", ""))
    architecture = ARCHITECTURES.get(given, given)
    if given == "gemma3" and any(name.startswith("dense.") for name in tensors):
        architecture = "gemma-embedding"
    if architecture != given:
        result.set("general.architecture", architecture)
        for key in [key for key in metadata if key.startswith(f"{given}.")]:
            result.rename(key, architecture + key[len(given) :])
    for old, new in KEYS.get(architecture, {}).items():
        result.rename(f"{architecture}.{old}", f"{architecture}.{new}")
    if fix := _FIXES.get(architecture):
        fix(result, architecture, tensors)
    return result, {_tensor_name(architecture, name): info for name, info in tensors.items()}


def _tensor_name(architecture: str, name: str) -> str:
    for pattern, replacement in TENSORS.get(architecture, ()):
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name


def _gemma3(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Values that every gemma3 has and old files leave out; vocabularies longer than the embedding are cut."""
    result.default(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-6)
    result.default(f"{prefix}.rope.freq_base", 1e6)
    result.default(f"{prefix}.rope.freq_base_swa", 1e4)
    scaled = any(f"{prefix}.rope.scaling.{key}" in result for key in ("type", "factor"))
    if not scaled and result.get(f"{prefix}.context_length", 0) >= 131072:
        result.set(f"{prefix}.rope.scaling.type", "linear")
        result.set(f"{prefix}.rope.scaling.factor", 8.0)
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        for key in ("tokens", "scores", "token_type"):
            if result.array_length(f"tokenizer.ggml.{key}") > embedding.shape[0]:
                result.cut(f"tokenizer.ggml.{key}", embedding.shape[0])


def _llama(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Llama 3 files from before `pre` existed: its splitter, and the end-of-turn token that its instruct models use."""
    if result.get("tokenizer.ggml.model") != "gpt2" or "tokenizer.ggml.pre" in result:
        return
    if result.array_length("tokenizer.ggml.tokens") != 128256:
        return
    result.set("tokenizer.ggml.pre", "llama-bpe")
    if result.get("tokenizer.ggml.eos_token_id") == 128001:
        result.set("tokenizer.ggml.eos_token_id", 128009)


def _mistral3(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    if result.get("tokenizer.ggml.model") == "gpt2" and result.get("tokenizer.ggml.pre", "default") == "default":
        result.set("tokenizer.ggml.pre", "tekken")


def _gpt_oss(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    if result.get("tokenizer.ggml.pre", "default") == "default":
        result.set("tokenizer.ggml.pre", "gpt-4o")
    if f"{prefix}.rope.scaling.factor" in result:
        result.default(f"{prefix}.rope.scaling.type", "yarn")


def _qwen2vl(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    sections = result.get(f"{prefix}.rope.mrope_section")
    if sections is not None:
        result.default(f"{prefix}.rope.dimension_sections", [*sections, *[0] * (4 - len(sections))])


def _qwen3vl(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    result.default(f"{prefix}.rope.dimension_sections", [24, 20, 20, 0])
    indexes = result.get(f"{prefix}.vision.deepstack_visual_indexes")
    if indexes is not None:
        result.default(f"{prefix}.n_deepstack_layers", len(indexes))


def _qwen35(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Layers without attention have 0 heads in Ollama's array; llama.cpp has one number."""
    heads = result.get(f"{prefix}.attention.head_count_kv")
    if isinstance(heads, list) and heads:
        result.set(f"{prefix}.attention.head_count_kv", max(heads))


def _lfm2(result: Overlay, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
    if result.get("tokenizer.ggml.pre", "default") == "default":
        result.set("tokenizer.ggml.pre", "lfm2")


_FIXES: dict[str, Callable[[Overlay, str, Mapping[str, TensorInfo]], None]] = {
    "gemma3": _gemma3,
    "gemma-embedding": _gemma3,
    "llama": _llama,
    "mistral3": _mistral3,
    "gpt-oss": _gpt_oss,
    "qwen2vl": _qwen2vl,
    "qwen3vl": _qwen3vl,
    "qwen3vlmoe": _qwen3vl,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "qwen3next": _qwen35,
    "lfm2": _lfm2,
}
