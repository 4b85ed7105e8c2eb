"""The random models are valid files of the shapes and types that were asked for, and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.engine import Bench, sizes
from bench.figures import Work
from bench.make_model import SHAPES, make, more_bits, random_blocks, tensor_type
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType, file_type_name
from ollamapy.quant.tensor import QuantTensor
from ollamapy.tokenizer import Tokenizer

TINY = SHAPES["tiny"]
MIXES = ("Q4_K_M", "Q6_K", "Q8_0", "Q4_0", "IQ2_XXS")


@pytest.mark.parametrize("mix", MIXES)
def test_file_is_what_was_asked_for(tmp_path: Path, mix: str) -> None:
    with GGUFFile.open(make(tmp_path / "tiny.gguf", TINY, mix)) as file:
        assert file_type_name(file.metadata["general.file_type"]) == mix
        assert len(file.tensors) == 2 + TINY.layers * 9
        assert file.tensors["token_embd.weight"].shape == (TINY.vocab, TINY.embedding)
        assert file.tensors["blk.1.attn_k.weight"].shape == (TINY.kv_heads * TINY.head, TINY.embedding)
        assert file.tensors["blk.0.ffn_gate.weight"].type is tensor_type(mix, "ffn_gate", 0, TINY.layers)
        for name in file.tensors:
            weight = QuantTensor.from_file(file, name).dequantize()
            assert torch.isfinite(weight).all(), name
            if weight.ndim == 2:
                assert 0.01 < float(weight.std()) < 0.04, name
                assert abs(float(weight.mean())) < 0.005, name


def test_same_seed_same_file(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a.gguf", TINY, "Q4_K_M"), make(tmp_path / "b.gguf", TINY, "Q4_K_M")
    assert first.read_bytes() == second.read_bytes()
    assert make(tmp_path / "c.gguf", TINY, "Q4_K_M", seed=1).read_bytes() != first.read_bytes()


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"mine")
    assert make(path, TINY, "Q6_K").read_bytes() == b"mine"


def test_tokenizer_knows_every_byte(tmp_path: Path) -> None:
    with GGUFFile.open(make(tmp_path / "tiny.gguf", TINY, "Q8_0")) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    assert tokenizer.vocab_size == TINY.vocab
    text = "any text, even ünïcode\n\t" + chr(0x1F600)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_blocks_are_random_bits_under_the_scales() -> None:
    blocks = random_blocks(GGMLType.Q8_0, (64, 64), np.random.default_rng(0)).reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2")
    assert float(scales.min() / (0.02 / 74)) >= 0.8 and float(scales.max() / (0.02 / 74)) <= 1.21
    assert len(np.unique(blocks[:, 2:])) == 256


def test_q4_k_m_spends_more_bits_on_half_of_the_layers() -> None:
    assert [layer for layer in range(16) if more_bits(layer, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert tensor_type("Q4_K_M", "ffn_down", 0, 16) is GGMLType.Q6_K
    assert tensor_type("Q4_K_M", "ffn_down", 2, 16) is GGMLType.Q4_K
    assert tensor_type("Q4_K_M", "ffn_up", 0, 16) is GGMLType.Q4_K


def test_engine_measures_every_column(tmp_path: Path) -> None:
    bench = Bench(make(tmp_path / "tiny.gguf", TINY, "Q4_K_M"), threads=1)
    work = Work(threads=1, repeats=1, batches=(4,))
    samples = bench.measure(work)
    assert list(samples) == work.columns
    assert all(value > 0 for values in samples.values() for value in values)
    assert bench.engine.check_integrity() == "ok" and not bench.engine.has_work


def test_sizes_count_a_tied_head_once(tmp_path: Path) -> None:
    with GGUFFile.open(make(tmp_path / "tiny.gguf", TINY, "Q8_0")) as file:
        found = sizes(file)
        matrices = {name: info.nbytes for name, info in file.tensors.items() if len(info.shape) == 2}
    assert found["decode_bytes"] == sum(matrices.values())
    per_layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert found["prefill_macs"] == TINY.layers * per_layer
