"""Decoding as tokens come: never half a character, and nothing lost against decoding at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import StreamDecoder, Tokenizer
from tests.tokenizer.builders import CONTROL, USER_DEFINED, bpe_metadata, spm_metadata

SPM = Tokenizer.from_gguf(
    spm_metadata({"▁": -9.0, "▁a": -1.0, "é": -2.0, "日": -3.0}, {"<think>": USER_DEFINED, "<|x|>": CONTROL})
)
BPE = Tokenizer.from_gguf(bpe_metadata(["Ã ©", "æ Ĺ"], {"<think>": USER_DEFINED, "<|x|>": CONTROL}))
TOKENIZERS = st.sampled_from([SPM, BPE])


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4), max_size=12)


def stream(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]], **options: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.feed(chunk) for chunk in chunks] + [decoder.flush()]


@given(TOKENIZERS.flatmap(lambda tokenizer: st.tuples(st.just(tokenizer), ids_of(tokenizer))), st.booleans())
def test_pieces_together_are_the_whole(case: tuple[Tokenizer, list[list[int]]], skip_special: bool) -> None:
    tokenizer, chunks = case
    ids = [id for chunk in chunks for id in chunk]
    whole = tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(stream(tokenizer, chunks, skip_special=skip_special)) == whole
    shown = b"".join(tokenizer.token_bytes(id) for id in ids if not (skip_special and tokenizer.is_control(id)))
    expected = shown.decode(errors="replace")
    assert whole == (expected.removeprefix(" ") if tokenizer.strips_first_space else expected)


@given(TOKENIZERS, st.text(max_size=20))
def test_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "")
    pieces = stream(tokenizer, [[id] for id in tokenizer.encode(text, parse_special=False)])
    assert "".join(pieces) == text and pieces[-1] == ""


@pytest.mark.parametrize(
    ("raw", "pieces"),
    [
        (b"\xe6\x97\xa5!", ["", "", "日", "!", ""]),
        (b"\xe6\x97!", ["", "", "\ufffd!", ""]),  # can no longer be completed
        (b"\xf0\x9f\x99", ["", "", "", "\ufffd"]),  # is not completed
        (b"\xffa", ["\ufffd", "a", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # a surrogate's bytes are no character
    ],
)
def test_broken_characters(raw: bytes, pieces: list[str]) -> None:
    byte_ids = {SPM.token_bytes(id): id for id in range(3, 259)}
    assert stream(SPM, [[byte_ids[bytes([byte])]] for byte in raw]) == pieces


def test_a_first_space_is_dropped_once_and_only_when_encoding_puts_it_there() -> None:
    a = SPM.encode("a")
    assert SPM.decode(a + a) == "a a"
    assert stream(SPM, [[], a, a]) == ["", "a", " a", ""]
    assert stream(SPM, [SPM.encode("<|x|>"), a]) == ["", "a", ""]
    assert stream(SPM, [a], continues=True) == [" a", ""]
    assert BPE.decode(BPE.encode(" a")) == " a"


def test_special_tokens() -> None:
    ids = BPE.encode("a<|x|><think>b")
    assert BPE.decode(ids) == "a<think>b"
    assert BPE.decode(ids, skip_special=False) == "a<|x|><think>b"
    assert SPM.token_bytes(3 + 0xE6) == b"\xe6" and SPM.token_text(3 + 0xE6) == "<0xE6>"


@pytest.mark.parametrize("id", [-1, 10**6])
def test_an_id_outside_the_vocabulary(id: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {id} is outside the vocabulary of"):
        BPE.decode([id])
