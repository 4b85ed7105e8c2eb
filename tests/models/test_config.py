"""ModelConfig: defaults, per-layer arrays, window patterns, dialects, and texts that name what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.reader import GGUFFile
from ollamapy.layers.spec import Rope, RopeScaling
from ollamapy.models import ARCHITECTURES
from ollamapy.models.config import ModelConfig


def metadata(architecture: str = "llama", **values: Any) -> dict[str, Any]:
    """The required keys, and `values` with "__" for "."; a value of None leaves the key out."""
    keys: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    keys |= {key.replace("__", "."): value for key, value in values.items()}
    named = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    return {"general.architecture": architecture, **named}


def config(architecture: str = "llama", **values: Any) -> ModelConfig:
    return ModelConfig.from_gguf(metadata(architecture, **values))


def test_defaults() -> None:
    c = config()
    assert c.num_heads == c.num_kv_heads == (4, 4, 4)
    assert c.key_length == c.value_length == (16, 16, 16)
    assert c.windows == (0, 0, 0)
    assert c.ropes == (Rope(16, 10_000.0, RopeScaling(original_context_length=512)),) * 3
    assert (c.attn_scale, c.attn_softcap, c.final_softcap) == (0.0, 0.0, 0.0)
    assert (c.causal, c.pooling_type, c.vocab_size) == (True, "last", 0)
    assert config(attention__causal=False).pooling_type == "mean"
    assert config(pooling_type=2).pooling_type == "cls"


def test_vocabulary_size_is_counted_without_the_key() -> None:
    values = metadata() | {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert ModelConfig.from_gguf(values).vocab_size == 3


def test_arrays_per_layer() -> None:
    c = config(attention__head_count=[4, 8, 4], attention__head_count_kv=[2, 1, 4], feed_forward_length=[10, 20, 30])
    assert c.num_heads == (4, 8, 4)
    assert c.num_kv_heads == (2, 1, 4)
    assert c.feed_forward_length == (10, 20, 30)
    assert c.kv_bytes_per_token(2) == 2 * (2 + 1 + 4) * (16 + 16)


@pytest.mark.parametrize(
    ("architecture", "pattern", "windows"),
    [
        ("llama", None, (9,) * 7),  # all layers, where nothing says otherwise
        ("gemma2", None, (9, 0, 9, 0, 9, 0, 9)),
        ("gemma3", None, (9, 9, 9, 9, 9, 0, 9)),
        ("gemma3", 3, (9, 9, 0, 9, 9, 0, 9)),
        ("gemma3", 1, (0,) * 7),
        ("gemma3", 0, (9,) * 7),
        ("qwen2", [False, True, True, False, False, True, False], (0, 9, 9, 0, 0, 9, 0)),
    ],
)
def test_window_patterns(architecture: str, pattern: Any, windows: tuple[int, ...]) -> None:
    more = {} if pattern is None else {"attention__sliding_window_pattern": pattern}
    assert config(architecture, block_count=7, attention__sliding_window=9, **more).windows == windows


def test_windowed_layers_have_their_own_heads_and_rope() -> None:
    c = config(
        block_count=2,
        attention__sliding_window=9,
        attention__sliding_window_pattern=[True, False],
        attention__key_length=32,
        attention__key_length_swa=16,
        rope__dimension_count=24,
        rope__dimension_count_swa=8,
        rope__freq_base_swa=500.0,
    )
    assert c.key_length == (16, 32)
    assert [(rope.dims, rope.base) for rope in c.ropes] == [(8, 500.0), (24, 10_000.0)]


def test_caps_that_are_missing_are_not_off() -> None:
    assert (config("gemma2").attn_softcap, config("gemma2").final_softcap) == (50.0, 30.0)
    off = config("gemma2", attn_logit_softcapping=0.0, final_logit_softcapping=0.0)
    assert (off.attn_softcap, off.final_softcap) == (0.0, 0.0)
    assert config("gemma3").attn_softcap == 0.0


def test_gemma3_files_of_older_ollama() -> None:
    c = config(
        "gemma3",
        block_count=6,
        context_length=131_072,
        attention__layer_norm_rms_epsilon=None,
        attention__sliding_window=1024,
        rope__global__freq_base=2e6,
        rope__local__freq_base=3e4,
    )
    assert c.norm_eps == 1e-6
    assert (c.ropes[0].base, c.ropes[0].scaling.factor) == (3e4, 1.0)
    assert (c.ropes[5].base, c.ropes[5].scaling.type, c.ropes[5].scaling.factor) == (2e6, "linear", 8.0)


def test_old_linear_scaling() -> None:
    scaling = config(rope__scale_linear=4.0).ropes[0].scaling
    assert (scaling.type, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"context_length": None}, "no key llama.context_length"),
        ({"embedding_length": "64"}, "llama.embedding_length must be a non-negative integer, not '64'"),
        ({"block_count": -1}, "llama.block_count must be a non-negative integer, not -1"),
        ({"block_count": 10**9}, "from 1 to 4096 layers"),
        ({"block_count": True}, "must be a non-negative integer, not True"),
        ({"attention.head_count": [4, 4]}, "one per layer"),
        ({"attention.head_count": 0}, "0 attention heads"),
        ({"attention.head_count_kv": 3}, "4 attention heads cannot share 3"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "must be a finite number, not nan"),
        ({"rope.scaling.type": "spiral"}, 'unknown rope.scaling.type "spiral"'),
        ({"rope.scaling.factor": 0.0}, "must be above 0"),
        ({"rope.freq_base": 0.0}, "freq_base must be above 1"),
        ({"rope.dimension_count": 32}, "does not fit heads of 16"),
        ({"rope.dimension_count": 7}, "does not fit heads of 16"),
        ({"attention.sliding_window_pattern": [True]}, "one per layer"),
        ({"pooling_type": 9}, "unknown pooling_type 9"),
        ({"expert_count": 4, "expert_used_count": 5}, "5 of 4 experts"),
        ({"expert_count": 10**9, "expert_used_count": 5}, "up to 4096"),
        ({"expert_gating_func": 77}, "unknown expert_gating_func 77"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], text: str) -> None:
    keys = metadata() | {f"llama.{key}": value for key, value in values.items()}
    with pytest.raises(UnsupportedModel, match=None) as error:
        ModelConfig.from_gguf({key: value for key, value in keys.items() if value is not None})
    assert text in str(error.value)


def test_unsupported_architecture_is_named_with_those_that_are() -> None:
    with pytest.raises(UnsupportedModel) as error:
        ModelConfig.from_gguf({"general.architecture": "rwkv9"})
    assert 'unsupported architecture "rwkv9"' in str(error.value)
    assert all(name in str(error.value) for name in ARCHITECTURES)
    with pytest.raises(UnsupportedModel, match="does not say its architecture"):
        ModelConfig.from_gguf({})


def test_real_files(smollm2_path: Path, gemma3_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        smollm2 = ModelConfig.from_gguf(file.metadata)
    assert (smollm2.num_heads[0], smollm2.num_kv_heads[0], smollm2.key_length[0]) == (9, 3, 64)
    assert smollm2.kv_bytes_per_token(2) == 30 * 3 * 128 * 2
    with GGUFFile.open(gemma3_path) as file:
        gemma3 = ModelConfig.from_gguf(file.metadata)
    assert [layer for layer, window in enumerate(gemma3.windows) if not window] == [5, 11, 17]
    assert (gemma3.windows[0], gemma3.ropes[0].base, gemma3.ropes[5].base) == (512, 1e4, 1e6)
    assert gemma3.vocab_size == 262_144


def test_reading_a_config_loads_no_torch() -> None:
    code = "import sys, ollamapy.models.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
