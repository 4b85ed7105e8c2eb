"""Metadata as an enemy would write it: each fault is a TokenizerError that names its key."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import Tokenizer
from tests.tokenizer.builders import bpe_metadata, metadata, spm_metadata

GOOD = {"spm": spm_metadata({"▁a": -1.0, "b": -2.0}), "bpe": bpe_metadata(["a b"])}
MISSING = object()


@pytest.mark.parametrize(
    ("kind", "key", "value", "problem"),
    [
        ("spm", "model", MISSING, "is missing"),
        ("spm", "model", 7, "must be a string, not int"),
        ("spm", "model", "rwkv", "unsupported tokenizer 'rwkv'; supported: bert, gemma4, gpt2, llama, t5"),
        ("spm", "model", "x" * 10_000, "unsupported tokenizer"),
        ("bpe", "pre", "nobody", "unknown pre-tokenizer 'nobody'; known: a.x-4.0,"),
        ("bpe", "pre", ["gpt-2"], "must be a string, not list"),
        ("spm", "tokens", MISSING, "is missing"),
        ("spm", "tokens", [], "is empty"),
        ("spm", "tokens", "abc", "must be an array, not str"),
        ("spm", "tokens", ["a", 7], "must be an array of strings"),
        ("spm", "scores", MISSING, "is missing"),
        ("spm", "scores", [0.0] * 260, "has 260 entries for 261 tokens"),
        ("spm", "scores", [float("nan")] * 261, "must be an array of finite numbers"),
        ("spm", "scores", [float("-inf")] * 261, "must be an array of finite numbers"),
        ("spm", "scores", ["0"] * 261, "must be an array of finite numbers"),
        ("spm", "token_type", [1] * 262, "has 262 entries for 261 tokens"),
        ("spm", "token_type", [9] * 261, r"unknown types \[9\]"),
        ("spm", "token_type", [-1] * 261, r"unknown types \[-1\]"),
        ("spm", "token_type", [1.0] * 261, "must be an array of integers"),
        ("spm", "bos_token_id", "1", "must be an integer, not '1'"),
        ("spm", "eos_token_id", 261, "261 is outside the vocabulary of 261 tokens"),
        ("spm", "eos_token_id", True, "must be an integer, not True"),
        ("spm", "eos_token_ids", [1, 900], "900 is outside the vocabulary"),
        ("spm", "eos_token_ids", 1, "must be an array, not int"),
        ("spm", "suppress_tokens", [1.5], "must be an array of integers"),
        ("spm", "add_bos_token", "yes", "must be a boolean, not 'yes'"),
        ("spm", "add_bos_token", 2, "must be a boolean, not 2"),
        ("spm", "add_space_prefix", 1.0, "must be a boolean, not 1.0"),
        ("bpe", "merges", ["a b", "b"], 'entry 1 is not "left right"'),
        ("bpe", "merges", ["a q q"], 'entry 0 is not "left right"'),
        ("bpe", "merges", ["b a"], "do not fit the vocabulary"),
    ],
)
def test_hostile_metadata(kind: str, key: str, value: Any, problem: str) -> None:
    changed = {**GOOD[kind], f"tokenizer.ggml.{key}": value}
    if value is MISSING:
        del changed[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=rf"^tokenizer\.ggml\.{key}: {problem}") as caught:
        Tokenizer.from_gguf(changed)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["<0xG0>", "<0x1>", "<0x041>", "0x41", "<0x٠٠>", ""])
def test_byte_tokens_must_be_hexadecimal(text: str) -> None:
    changed = spm_metadata({})
    changed["tokenizer.ggml.tokens"][100] = text
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens: token 100 has the type of a byte"):
        Tokenizer.from_gguf(changed)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-3, 300), st.text(max_size=3))),
)
KEYS = [
    "model",
    "pre",
    "tokens",
    "scores",
    "token_type",
    "merges",
    "bos_token_id",
    "eos_token_ids",
    "add_eos_token",
    "suppress_tokens",
]


@given(st.sampled_from(sorted(GOOD)), st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
def test_junk_is_an_error_or_a_tokenizer(kind: str, junk: dict[str, Any]) -> None:
    try:
        tokenizer = Tokenizer.from_gguf({**GOOD[kind], **{f"tokenizer.ggml.{key}": value for key, value in junk.items()}})
    except TokenizerError:
        return
    ids = tokenizer.encode("ab <s>", add_special=True)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert isinstance(tokenizer.decode(ids), str)


def test_empty_and_odd_tokens_do_no_harm() -> None:
    base = metadata(
        "llama", ["", "<s>", "</s>", "", "▁", "\ufeff", "a" * 5000], scores=[0.0] * 7, token_type=[4, 3, 3, 3, 1, 1, 1]
    )
    assert Tokenizer.from_gguf(base).encode("a", add_special=True)[:2] == [1, 4]


def test_importing_loads_neither_torch_nor_numpy() -> None:
    heavy = ("torch", "numpy", "transformers")
    code = f"import json, sys, ollamapy.tokenizer; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
