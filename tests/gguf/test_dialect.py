"""Ollama's spelling of keys and tensor names becomes llama.cpp's; llama.cpp's own files pass through unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ollamapy.gguf.dialect import Overlay, normalise
from ollamapy.gguf.metadata import Metadata
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf


def tensors(*names: str, rows: int = 4) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, GGMLType.F32, (rows, 2), rows * 8, 0, 0) for name in names}


def norm(metadata: dict[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    result, infos = normalise(metadata, tensors(*names))
    assert len(result) == len(dict(result)) == len(list(result))
    return dict(result), infos


def test_gemma3_bases_and_defaults() -> None:
    metadata, _ = norm(
        {
            "general.architecture": "gemma3",
            "gemma3.context_length": 131072,
            "gemma3.rope.global.freq_base": 2e6,
            "gemma3.rope.local.freq_base": 2e4,
        }
    )
    assert metadata == {
        "general.architecture": "gemma3",
        "gemma3.context_length": 131072,
        "gemma3.rope.freq_base": 2e6,
        "gemma3.rope.freq_base_swa": 2e4,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    small, _ = norm({"general.architecture": "gemma3", "gemma3.context_length": 32768})
    assert small["gemma3.rope.freq_base"] == 1e6 and "gemma3.rope.scaling.factor" not in small


def test_gemma3_vocabulary_is_cut_to_the_embedding() -> None:
    given = {
        "general.architecture": "gemma3",
        "tokenizer.ggml.tokens": ["a", "b", "c", "d", "e", "f"],
        "tokenizer.ggml.scores": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "tokenizer.ggml.token_type": [1, 1, 1, 1],
    }
    metadata, _ = norm(given, "token_embd.weight")
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "c", "d"]
    assert metadata["tokenizer.ggml.scores"] == [1.0, 2.0, 3.0, 4.0]
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 1, 1]


def test_gemma3_with_dense_layers_is_the_embedding_model() -> None:
    given = {"general.architecture": "gemma3", "gemma3.embedding_length": 768, "gemma3.rope.global.freq_base": 7.0}
    metadata, infos = norm(given, "token_embd.weight", "norm.weight", "dense.0.weight", "dense.1.weight")
    assert metadata["general.architecture"] == "gemma-embedding"
    assert metadata["gemma-embedding.embedding_length"] == 768
    assert metadata["gemma-embedding.rope.freq_base"] == 7.0
    assert not any(key.startswith("gemma3.") for key in metadata)
    assert list(infos) == ["token_embd.weight", "output_norm.weight", "dense_2.weight", "dense_3.weight"]
    assert infos["dense_2.weight"].name == "dense.0.weight"


def test_old_llama3_gets_its_splitter_and_end_of_turn() -> None:
    given = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["x"] * 128256,
        "tokenizer.ggml.eos_token_id": 128001,
    }
    metadata, _ = norm(given)
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe" and metadata["tokenizer.ggml.eos_token_id"] == 128009
    for change in ({"tokenizer.ggml.pre": "llama-bpe"}, {"tokenizer.ggml.tokens": ["x"]}, {"tokenizer.ggml.model": "llama"}):
        assert norm({**given, **change})[0]["tokenizer.ggml.eos_token_id"] == 128001


def test_mistral3_keys() -> None:
    given = {
        "general.architecture": "mistral3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "mistral3.rope.scaling.beta_fast": 32.0,
        "mistral3.rope.scaling.beta_slow": 1.0,
        "mistral3.rope.scaling.mscale_all_dim": 1.0,
        "mistral3.rope.scaling_beta": 0.1,
        "mistral3.rope.scaling.factor": 16.0,
    }
    metadata, _ = norm(given)
    assert metadata == {
        "general.architecture": "mistral3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "mistral3.rope.scaling.yarn_beta_fast": 32.0,
        "mistral3.rope.scaling.yarn_beta_slow": 1.0,
        "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
        "mistral3.attention.temperature_scale": 0.1,
        "mistral3.rope.scaling.factor": 16.0,
    }


def test_gptoss_names() -> None:
    given = {"general.architecture": "gptoss", "gptoss.block_count": 24, "gptoss.rope.scaling.factor": 32.0}
    names = ("blk.0.attn_out.weight", "blk.0.attn_out.bias", "blk.11.attn_sinks", "blk.0.ffn_norm.weight", "output.weight")
    metadata, infos = norm(given, *names)
    assert metadata["general.architecture"] == "gpt-oss" and metadata["gpt-oss.block_count"] == 24
    assert metadata["gpt-oss.rope.scaling.type"] == "yarn" and metadata["tokenizer.ggml.pre"] == "gpt-4o"
    assert list(infos) == [
        "blk.0.attn_output.weight",
        "blk.0.attn_output.bias",
        "blk.11.attn_sinks.weight",
        "blk.0.post_attention_norm.weight",
        "output.weight",
    ]
    modern = ("blk.0.attn_sinks.weight", "blk.0.attn_output.weight", "blk.0.post_attention_norm.weight")
    assert list(norm({"general.architecture": "gpt-oss"}, *modern)[1]) == list(modern)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"general.architecture": "qwen25vl", "qwen25vl.rope.mrope_section": [16, 24, 24]},
         "qwen2vl.rope.dimension_sections", [16, 24, 24, 0]),
        ({"general.architecture": "qwen3vl"}, "qwen3vl.rope.dimension_sections", [24, 20, 20, 0]),
        ({"general.architecture": "qwen3vl", "qwen3vl.vision.deepstack_visual_indexes": [8, 16, 24]},
         "qwen3vl.n_deepstack_layers", 3),
        ({"general.architecture": "qwen35", "qwen35.attention.head_count_kv": [0, 0, 0, 2]},
         "qwen35.attention.head_count_kv", 2),
        ({"general.architecture": "olmo3", "olmo3.block_count": 2}, "olmo2.block_count", 2),
        ({"general.architecture": "lfm2"}, "tokenizer.ggml.pre", "lfm2"),
    ],
)  # fmt: skip
def test_other_architectures(given: dict[str, Any], key: str, value: object) -> None:
    assert norm(given)[0][key] == value


def test_unknown_and_modern_files_pass_through() -> None:
    given = {"general.architecture": "qwen3", "qwen3.block_count": 1, "tokenizer.ggml.pre": "qwen2"}
    metadata, infos = norm(given, "blk.0.attn_out.weight", "norm.weight")
    assert metadata == given and list(infos) == ["blk.0.attn_out.weight", "norm.weight"]
    assert norm({}, "a")[0] == {}


def test_arrays_stay_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "g.gguf"
    given = {"general.architecture": "gemma3", "tokenizer.ggml.tokens": ["a", "b", "c"]}
    write_gguf(path, given, [("token_embd.weight", GGMLType.F32, (2, 1), bytes(8))])
    file = GGUFFile.open(path)
    metadata, infos = normalise(file.metadata, file.tensors)
    assert isinstance(file.metadata, Metadata) and "tokenizer.ggml.tokens" not in file.metadata._values
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.data(infos["token_embd.weight"].name) == bytes(8)


def test_overlay_answers_like_a_dict() -> None:
    overlay = Overlay({"a": 1, "b": 2, "c": 3})
    overlay.rename("a", "z")
    overlay.rename("b", "c")
    overlay.rename("z", "y")
    overlay.default("c", 9)
    overlay.default("d", 4)
    assert dict(overlay) == {"c": 3, "y": 1, "d": 4} and "a" not in overlay and "z" not in overlay and len(overlay) == 3
    with pytest.raises(KeyError):
        overlay["a"]


def test_lengths_through_two_layers_decode_nothing(tmp_path: Path) -> None:
    """Files are normalised when they are opened and again by what reads their config."""
    path = tmp_path / "m.gguf"
    given = {"general.architecture": "gemma3", "tokenizer.ggml.tokens": [f"t{i}" for i in range(8)], "tokenizer.ggml.x": ["a"]}
    write_gguf(path, given, [])
    with GGUFFile.open(path) as file:
        for rows, expected in ((8, 8), (5, 5)):
            once, _ = normalise(file.metadata, tensors("token_embd.weight", rows=rows))
            twice, _ = normalise(once, {})
            assert isinstance(twice, Overlay)
            assert "tokenizer.ggml.tokens" not in file.metadata._values
            length = twice.array_length("tokenizer.ggml.tokens")
            assert rows < 8 or "tokenizer.ggml.tokens" not in file.metadata._values
            assert length == expected == len(twice["tokenizer.ggml.tokens"])
            assert twice.array_length("tokenizer.ggml.missing") == 0
            file.metadata._values.pop("tokenizer.ggml.tokens")
