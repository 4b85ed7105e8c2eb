"""SentencePiece BPE against SentencePiece itself, against the definition, and against cutting nothing beforehand."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.tokenizer import Tokenizer
from ollamapy.tokenizer.merge import Merger, piece_pattern
from tests.tokenizer.builders import (
    BYTE,
    CONTROL,
    CORPUS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    metadata,
    spm_metadata,
    train_sentencepiece,
)

TEXT = st.text(st.sampled_from("abcdefghinoqrstuvwxyz  .,-=12é\n日"), max_size=60)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Tokenizer]:
    processor, pieces, _ = train_sentencepiece(
        model_type="bpe", vocab_size=600, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    types = [kind for _, _, kind in pieces]
    assert set(types) == {NORMAL, UNKNOWN, CONTROL, BYTE}
    made = metadata("llama", [text for text, _, _ in pieces], scores=[score for _, score, _ in pieces], token_type=types)
    return processor, Tokenizer.from_gguf(made)


@given(text=st.one_of(TEXT, st.text(max_size=20), st.sampled_from(CORPUS)))
def test_equals_sentencepiece(trained: tuple[Any, Tokenizer], text: str) -> None:
    processor, tokenizer = trained
    text = text.replace("\0", "")  # which SentencePiece takes for the end
    if text:  # of "" SentencePiece makes nothing, and so do we
        assert tokenizer.encode(text, parse_special=False) == processor.encode(text)


@given(text=TEXT)
def test_round_trip(trained: tuple[Any, Tokenizer], text: str) -> None:
    _, tokenizer = trained
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def merge_slowly(piece: str, scores: dict[str, float]) -> list[str]:
    """The definition: the pair with the best score, the leftmost of equals, until none is a token."""
    symbols = list(piece)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(
    st.dictionaries(st.text("ab▁", min_size=2, max_size=5), st.integers(-5, 0).map(float), max_size=30),
    st.text("ab▁c", max_size=30),
)
def test_merging_is_the_definition_and_words_are_exact(scores: dict[str, float], text: str) -> None:
    merger = Merger({token: -score for token, score in scores.items()}, "", {}, {}, None)
    assert merger.merge(text) == merge_slowly(text, scores)
    glue = [token[i - 1] for token in scores for i in range(1, len(token)) if token[i] == "▁" and token[i - 1] != "▁"]
    pieces = piece_pattern(glue).findall(text)
    assert "".join(pieces) == text
    assert [symbol for piece in pieces for symbol in merger.merge(piece)] == merge_slowly(text, scores)


def test_a_token_across_a_space_is_found() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata({">▁</": -1.0, ">▁": -2.0, "</": -3.0, ">": -9.0}, add_space_prefix=False))
    texts = [tokenizer.token_text(id) for id in tokenizer.encode("> </> x")]
    assert texts == [">▁</", ">▁", "<0x78>"]


@pytest.mark.parametrize(
    ("prefix", "text", "texts"),
    [
        (True, "a<s>a a", "▁a <s> ▁a ▁a"),
        (True, " a", "▁▁ a"),
        (True, "<tool>a", "<tool> ▁a"),
        (False, "a<s>a a", "a <s> a ▁a"),
    ],
)
def test_space_prefix_after_special_tokens(prefix: bool, text: str, texts: str) -> None:
    pieces = {"▁a": -1.0, "▁▁": -0.5, "a": -3.0, "▁": -4.0}
    tokenizer = Tokenizer.from_gguf(spm_metadata(pieces, {"<tool>": USER_DEFINED}, add_space_prefix=prefix))
    assert [tokenizer.token_text(id) for id in tokenizer.encode(text)] == texts.split()


def test_merging_never_makes_a_control_token() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata({"</": -1.0, "s>": -2.0, "<": -3.0}, add_space_prefix=False))
    assert [tokenizer.token_text(id) for id in tokenizer.encode("</s>", parse_special=False)] == ["</", "s>"]
    assert tokenizer.encode("</s>") == [2]


def test_without_byte_tokens_unknown_characters_become_one_unknown_token() -> None:
    made = metadata("llama", ["<unk>", "<s>", "</s>", "a"], scores=[0.0] * 4, token_type=[UNKNOWN, CONTROL, CONTROL, NORMAL])
    tokenizer = Tokenizer.from_gguf({**made, "tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("axya") == [3, 0, 3]


def test_phi3_drops_white_space_after_its_special_tokens() -> None:
    added = {"<|user|>": CONTROL, "<|end|>": CONTROL}
    made = spm_metadata({"a": -1.0, "▁a": -0.5}, added, **{"general.name": "Phi-3 mini", "add_space_prefix": False})
    tokenizer = Tokenizer.from_gguf(made)
    assert [tokenizer.token_text(id) for id in tokenizer.encode("<|user|> \n a<s> a")] == ["<|user|>", "a", "<s>", "▁a"]


def test_text_without_spaces_takes_n_log_n() -> None:
    tokenizer = Tokenizer.from_gguf(
        spm_metadata({"▁": -9.0, "lo": -1.0, "rem": -2.0, "re": -3.0, "lorem": -4.0, "aa": -5.0, "aaaa": -6.0})
    )
    for text in ("lorem" * 40_000, "a" * 200_000, "é" * 200_000):
        started = time.perf_counter()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert time.perf_counter() - started < 10  # 0.2 to 0.8 s; a quadratic way takes hours
