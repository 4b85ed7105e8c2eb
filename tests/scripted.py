"""A llama model of a few kilobytes that says given words, whatever it is asked: real engine, known answer.

Its hidden state is a one-hot vector: each word's embedding is its place in the script, all other tokens share one, and the
output layer maps each place to the word after it. Attention and feed-forward weights are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from tests.tokenizer.builders import spm_metadata

HEADS, HEAD_DIM, EOS = 2, 64, 2
WIDTH = HEADS * HEAD_DIM  # of the hidden state: one less is the longest script
FIRST_WORD = 259  # after <unk>, <s>, </s> and the bytes
SHARPNESS = 20.0  # logits of the next word; the others' are 0, so that sampling at any usual temperature says it, too


def write_scripted(path: Path, pieces: Sequence[str], *, loop: bool = False, **metadata: Any) -> Path:
    """`pieces` are distinct words in SentencePiece's form ("▁Hello"); after the last comes the end, or the first again."""
    assert len(set(pieces)) == len(pieces) < WIDTH
    words = range(FIRST_WORD, FIRST_WORD + len(pieces))
    embedding = np.zeros((FIRST_WORD + len(pieces), WIDTH), np.float32)
    embedding[:FIRST_WORD, 0] = 1
    output = np.zeros_like(embedding)
    followers = [*words, words[0] if loop else EOS]
    for place, follower in enumerate(followers):
        output[follower, place] = SHARPNESS / WIDTH**0.5  # the norm makes the one of the one-hot vector sqrt(WIDTH)
    for place, word in enumerate(words, start=1):
        embedding[word, place] = 1
    write_gguf(
        path,
        {
            "general.architecture": "llama",
            "general.file_type": 0,
            "llama.context_length": 2048,
            "llama.embedding_length": WIDTH,
            "llama.block_count": 1,
            "llama.feed_forward_length": WIDTH,
            "llama.attention.head_count": HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-6,
            **spm_metadata({piece: -1.0 - at for at, piece in enumerate(pieces)}, bos_token_id=1, eos_token_id=EOS),
            **{name.replace("__", "."): value for name, value in metadata.items()},
        },
        [(name, GGMLType.F32, array.shape, array.tobytes()) for name, array in _tensors(embedding, output).items()],
    )
    return path


def _tensors(embedding: np.ndarray, output: np.ndarray) -> dict[str, np.ndarray]:
    square, ones = np.zeros((WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
    block = {f"blk.0.{name}.weight": square for name in names.split()}
    norms = {"blk.0.attn_norm.weight": ones, "blk.0.ffn_norm.weight": ones, "output_norm.weight": ones}
    return {"token_embd.weight": embedding, "output.weight": output, **block, **norms}
