"""The unigram model against SentencePiece itself, its normalization table included."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import Tokenizer
from tests.tokenizer.builders import CONTROL, CORPUS, NORMAL, UNKNOWN, USER_DEFINED, metadata, train_sentencepiece

TEXT = st.one_of(st.text("abceghnoqtuvx  .,-=13éﬁ½Ａ㍿\t", max_size=60), st.text(max_size=20), st.sampled_from(CORPUS))


def build(merge_spaces: bool) -> tuple[Any, dict[str, Any]]:
    processor, pieces, charsmap = train_sentencepiece(
        model_type="unigram", vocab_size=220, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=merge_spaces
    )
    assert len(charsmap) > 1000
    tokens, scores, types = zip(*pieces, strict=True)
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    keys = {"remove_extra_whitespaces": merge_spaces, "precompiled_charsmap": list(charsmap), **ids}
    return processor, metadata("t5", list(tokens), scores=list(scores), token_type=list(types), **keys)


BUILT = {merge: build(merge) for merge in (False, True)}
TOKENIZERS = {merge: Tokenizer.from_gguf(made) for merge, (_, made) in BUILT.items()}


@given(TEXT, st.booleans())
def test_equals_sentencepiece(text: str, merge_spaces: bool) -> None:
    text = text.replace("\0", "").replace("▁", "")  # SentencePiece has ▁ for a space in its input too
    processor, tokenizer = BUILT[merge_spaces][0], TOKENIZERS[merge_spaces]
    if processor.normalize(text).strip("▁"):
        assert tokenizer.encode(text, parse_special=False) == processor.encode(text)


def test_frame_and_round_trip() -> None:
    tokenizer = TOKENIZERS[True]
    ids = tokenizer.encode("the quick fox", add_special=True)
    assert ids[-1] == 2 and not tokenizer.add_bos
    assert tokenizer.decode(ids) == "the quick fox"


def test_text_never_becomes_a_control_token() -> None:
    tokenizer = TOKENIZERS[True]
    assert 2 not in tokenizer.encode("a</s>b", parse_special=False)
    assert 2 in tokenizer.encode("a</s>b")


def test_table_in_base64() -> None:
    made = dict(BUILT[True][1])
    made["tokenizer.ggml.precompiled_charsmap"] = list(base64.b64encode(bytes(made["tokenizer.ggml.precompiled_charsmap"])))
    assert Tokenizer.from_gguf(made).encode("ﬁve Ａ") == TOKENIZERS[True].encode("ﬁve Ａ")


def test_table_in_signed_bytes() -> None:
    made = dict(BUILT[True][1])
    made["tokenizer.ggml.precompiled_charsmap"] = [
        b - 256 if b > 127 else b for b in made["tokenizer.ggml.precompiled_charsmap"]
    ]
    assert Tokenizer.from_gguf(made).encode("ﬁve Ａ") == TOKENIZERS[True].encode("ﬁve Ａ")


@pytest.mark.parametrize(
    "table",
    [[1, 2], [255] * 50, [8, 0, 0, 0, *[255] * 8, 65, 0], [300], [4, 0, 0, 0, 0, 0, 0, 0, 255], list(b"AAAA" * 5), ["a"]],
)
def test_malformed_table(table: list[Any]) -> None:
    made = {**BUILT[True][1], "tokenizer.ggml.precompiled_charsmap": table}
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.precompiled_charsmap"):
        Tokenizer.from_gguf(made).encode("a Ａ b")


def test_tokens_across_words_and_user_defined_ones() -> None:
    tokens = ["<pad>", "</s>", "<unk>", "▁a", "▁b", "▁a▁b", "<x>"]
    types = [CONTROL, CONTROL, UNKNOWN, NORMAL, NORMAL, NORMAL, USER_DEFINED]
    made = metadata("t5", tokens, scores=[0.0, 0.0, 0.0, -2.0, -2.0, -1.0, 0.0], token_type=types)
    assert Tokenizer.from_gguf(made).encode("a b<x>b zz") == [5, 6, 4, 2]
