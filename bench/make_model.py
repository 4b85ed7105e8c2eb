"""Writes GGUF files with random weights, for speed only: the shapes and type mixes of real models, readable by llama.cpp too.

Every block is random bits under sane float16 scales, so weights have a standard deviation near 0.02 and logits stay finite.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollamapy.gguf.types import TYPES, FileType, GGMLType, GGUFValue, ValueType, tensor_nbytes
from ollamapy.gguf.writer import TensorSource, write_gguf

Bytes = NDArray[np.uint8]
SPREAD = 0.02  # standard deviation of a weight


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with tied embeddings."""

    name: str
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocab: int


SHAPES = {
    "llama-1b": Shape("random-llama-1b", 16, 2048, 8192, 32, 8, 64, 128256),
    "tiny": Shape("random-llama-tiny", 2, 256, 512, 4, 2, 64, 700),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """A float16 of a block: at byte `offset`, near `size`."""

    offset: int
    size: float


# Standard deviation of the integers: 4 bits 4.6, 8 bits 74; a K block's 6-bit sub-scale has mean 31.5. Minima are set so that
# a weight's mean is near 0: mean integer times scale.
SCALES: dict[GGMLType, tuple[Scale, ...]] = {
    GGMLType.Q4_0: (Scale(0, SPREAD / 4.6),),
    GGMLType.Q8_0: (Scale(0, SPREAD / 74),),
    GGMLType.Q4_K: (Scale(0, SPREAD / 4.6 / 31.5), Scale(2, 7.5 * SPREAD / 4.6 / 31.5)),
    GGMLType.Q6_K: (Scale(208, SPREAD / 18.5 / 74),),  # signed 8-bit sub-scales
    GGMLType.Q2_K: (Scale(80, SPREAD / 1.1 / 9), Scale(82, 1.5 * SPREAD / 1.1 / 9)),
    GGMLType.IQ2_XXS: (Scale(0, SPREAD / 22 / 2.3),),  # signed 8, 25 or 43, times a quarter of 0.5 to 15.5
    GGMLType.IQ3_S: (Scale(0, SPREAD / 9.2 / 18.5),),
}


def random_blocks(type: GGMLType, shape: tuple[int, ...], rng: np.random.Generator) -> Bytes:
    """A tensor's bytes. F32 are norm weights near 1."""
    if type is GGMLType.F32:
        return rng.uniform(0.9, 1.1, shape).astype("<f4").view(np.uint8).reshape(-1)
    blocks = rng.integers(0, 256, tensor_nbytes(type, shape), dtype=np.uint8).reshape(-1, TYPES[type].type_size)
    factors = rng.uniform(0.8, 1.2, len(blocks))
    for scale in SCALES[type]:
        halves = (factors * scale.size).astype("<f2")
        blocks[:, scale.offset : scale.offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def more_bits(layer: int, layers: int) -> bool:
    """Whether attn_v and ffn_down of a layer are Q6_K in a Q4_K_M: the first and last eighth, a third of the others."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensor_type(mix: str, part: str, layer: int, layers: int) -> GGMLType:
    """What llama-quantize would choose for a Llama's matrix `part`."""
    if part == "token_embd":  # tied: it is the output head too
        return GGMLType.Q8_0 if mix == "Q8_0" else GGMLType.Q6_K
    if mix == "Q4_K_M":
        return GGMLType.Q6_K if part in ("attn_v", "ffn_down") and more_bits(layer, layers) else GGMLType.Q4_K
    if mix == "IQ2_XXS" and part in ("attn_v", "attn_output"):
        return GGMLType.Q4_K if part == "attn_v" else GGMLType.IQ3_S
    if mix == "IQ2_XXS" and part == "ffn_down" and layer < layers // 8:
        return GGMLType.Q2_K
    return GGMLType[mix]


def tensors(shape: Shape, mix: str, seed: int = 0) -> Iterator[TensorSource]:
    """All tensors of a model; the bytes of each are made when the writer asks for them."""
    numbers = itertools.count()

    def source(name: str, type: GGMLType, size: tuple[int, ...]) -> TensorSource:
        rng = np.random.default_rng((seed, next(numbers)))
        return name, type, size, lambda: random_blocks(type, size, rng).tobytes()

    embedding, queries, keys = shape.embedding, shape.heads * shape.head, shape.kv_heads * shape.head
    matrices = {
        "attn_q": (queries, embedding),
        "attn_k": (keys, embedding),
        "attn_v": (keys, embedding),
        "attn_output": (embedding, queries),
        "ffn_gate": (shape.feed_forward, embedding),
        "ffn_up": (shape.feed_forward, embedding),
        "ffn_down": (embedding, shape.feed_forward),
    }
    yield source("token_embd.weight", tensor_type(mix, "token_embd", 0, shape.layers), (shape.vocab, embedding))
    yield source("output_norm.weight", GGMLType.F32, (embedding,))
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield source(f"blk.{layer}.{norm}.weight", GGMLType.F32, (embedding,))
        for part, size in matrices.items():
            yield source(f"blk.{layer}.{part}.weight", tensor_type(mix, part, layer, shape.layers), size)


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for code points from 256 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    extra = itertools.count(0x100)
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: the bytes, then pairs, then triples of them; the last two tokens are controls."""
    letters = byte_letters()
    pairs = ((left + right, f"{left} {right}") for left in letters for right in letters)
    triples = ((a + b + c, f"{a + b} {c}") for a in letters for b in letters for c in letters)
    made = list(itertools.islice(itertools.chain(pairs, triples), size - len(letters) - 2))
    return [*letters, *(token for token, _ in made), "<|begin|>", "<|end|>"], [merge for _, merge in made]


def metadata(shape: Shape, mix: str) -> dict[str, Any]:
    tokens, merges = vocabulary(shape.vocab)
    kinds = [1] * (shape.vocab - 2) + [3, 3]  # normal, control
    return {
        "general.architecture": "llama",
        "general.name": f"{shape.name} {mix}",
        "general.file_type": int(FileType[mix]),
        "llama.block_count": shape.layers,
        "llama.context_length": 131072,
        "llama.embedding_length": shape.embedding,
        "llama.feed_forward_length": shape.feed_forward,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": GGUFValue(ValueType.INT32, kinds),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": shape.vocab - 2,
        "tokenizer.ggml.eos_token_id": shape.vocab - 1,
    }


def make(path: Path, shape: Shape, mix: str, seed: int = 0) -> Path:
    """Writes the file if it is not there. `mix`: Q4_K_M, Q6_K, Q8_0, Q4_0 or IQ2_XXS."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(path, metadata(shape, mix), list(tensors(shape, mix, seed)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--mix", choices=["Q4_K_M", "Q6_K", "Q8_0", "Q4_0", "IQ2_XXS"], default="Q4_K_M")
    args = parser.parse_args()
    print(make(args.path, SHAPES[args.shape], args.mix))


if __name__ == "__main__":
    main()
