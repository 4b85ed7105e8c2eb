"""WordPiece against the `tokenizers` library's."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import Tokenizer
from tests.tokenizer.builders import CONTROL, CORPUS, NORMAL, metadata

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def build(lowercase: bool) -> tuple[HFTokenizer, Tokenizer]:
    theirs = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    theirs.train_from_iterator(
        [*CORPUS, "ABC xyz 日本"], trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    theirs.encode_special_tokens = True  # as text
    vocabulary = theirs.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens = [text if text in SPECIAL else text[2:] if text.startswith("##") else "▁" + text for text in texts]
    types = [CONTROL if text in SPECIAL else NORMAL for text in texts]
    ids = {"unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0, "mask_token_id": 4}
    keys = {} if lowercase else {"normalizer.lowercase": False}
    made = metadata("bert", tokens, token_type=types, **ids)
    return theirs, Tokenizer.from_gguf({**made, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}})


CASED, UNCASED = build(lowercase=False), build(lowercase=True)
TEXT = st.one_of(st.text("abceghnoqtuvxABÉé  .,-'日\t13", max_size=60), st.text(max_size=30), st.sampled_from(CORPUS))


@given(TEXT)
def test_equals_the_librarys(text: str) -> None:
    for theirs, ours in (CASED, UNCASED):
        assert ours.encode(text, parse_special=False) == theirs.encode(text, add_special_tokens=False).ids


def test_frame_and_special_tokens() -> None:
    _, ours = UNCASED
    assert ours.encode("", add_special=True) == [2, 3]
    assert ours.encode("The [MASK] fox", add_special=True)[2] == 4
    assert 4 not in ours.encode("The [MASK] fox", parse_special=False)
    assert ours.encode("[CLS] fox [SEP]", add_special=True) == ours.encode("fox", add_special=True)
    assert ours.decode(ours.encode("the quick FOX", add_special=True)) == "the quick fox"


def test_a_long_word_takes_linear_time() -> None:
    """The library takes 1.4 s for 4,000 letters; llama.cpp knows no longest word, so neither do we."""
    _, ours = UNCASED
    started = time.perf_counter()
    assert len(ours.encode("fox" * 30_000)) >= 30_000
    assert time.perf_counter() - started < 5


def test_without_cls() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.cls_token_id: is not set"):
        Tokenizer.from_gguf(metadata("bert", ["▁a", "[UNK]"], unknown_token_id=1))
