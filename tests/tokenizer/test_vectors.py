"""Exact ids on real vocabularies: llama.cpp's test vectors, and golden ids of two real models."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ollamapy.gguf.reader import GGUFFile
from ollamapy.tokenizer import StreamDecoder, Tokenizer
from tests.conftest import golden

NAMES = ["bert-bge", "command-r", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]
VOCABS = Path(os.environ.get("OLLAMAPY_TEST_VOCABS", Path(__file__).parents[2].parent / "shared" / "golden" / "vocabs"))


def load(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile.open(path).metadata)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_vectors(name: str) -> None:
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"llama.cpp's vocabularies are not in {VOCABS}; name their folder in OLLAMAPY_TEST_VOCABS")
    tokenizer = load(path)
    cases = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(id) for id in line.split()] for line in path.with_name(path.name + ".out").read_text().split("\n")]
    assert len(cases) == len(expected) == 47
    for case, ids in zip(cases, expected, strict=True):
        assert tokenizer.encode(case, parse_special=False) == ids, case
        if name != "bert-bge":  # which lowercases
            assert tokenizer.decode(ids, skip_special=False) == case


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def real(request: pytest.FixtureRequest) -> tuple[Tokenizer, dict[str, Any]]:
    path = request.getfixturevalue({"smollm2-135m": "smollm2_path", "gemma3-270m": "gemma3_path"}[request.param])
    return load(path), golden(request.param)


def test_golden_ids(real: tuple[Tokenizer, dict[str, Any]]) -> None:
    tokenizer, expected = real
    assert len(expected["tokenize"]) == 40
    for case in expected["tokenize"]:
        assert tokenizer.encode(case["text"], parse_special=False) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]) == case["ids_special"], case["text"]
        assert tokenizer.decode(case["ids_special"], skip_special=False) == case["text"]
        decoder = StreamDecoder(tokenizer, skip_special=False)
        pieces = [decoder.feed([id]) for id in case["ids"]] + [decoder.flush()]
        assert "".join(pieces) == case["text"] and "\ufffd" not in "".join(pieces)


def test_special_tokens_of_smollm2(smollm2_path: Path) -> None:
    tokenizer = load(smollm2_path)
    assert {tokenizer.token_text(id) for id in tokenizer.eog_ids} == {"<|endoftext|>", "<|im_end|>", "<reponame>"}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (1, 2, False, False)
    assert tokenizer.vocab_size == 49152 and tokenizer.suppress_ids == ()


def test_special_tokens_of_gemma3(gemma3_path: Path) -> None:
    tokenizer = load(gemma3_path)
    assert {tokenizer.token_text(id) for id in tokenizer.eog_ids} == {"<eos>", "<end_of_turn>", "</s>"}
    assert tokenizer.encode("<bos>hi", add_special=True) == tokenizer.encode("hi", add_special=True) == [2, 2202]
    assert tokenizer.is_control(105) and not tokenizer.is_control(107)


@pytest.mark.parametrize(("fixture", "target"), [("smollm2_path", 0.25), ("gemma3_path", 1.5)])
def test_loading_is_quick(fixture: str, target: float, request: pytest.FixtureRequest) -> None:
    """Twice the target, for slow machines; 0.07 s and 0.29 s on two cores of 2.x GHz."""
    path = request.getfixturevalue(fixture)
    started = time.perf_counter()
    load(path)
    assert time.perf_counter() - started < 2 * target
