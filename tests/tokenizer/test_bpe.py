"""Byte-pair encoding with merges: the byte alphabet, and plain text with ▁, against the `tokenizers` library's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import Tokenizer
from ollamapy.tokenizer.bpe import BYTE_OF, decode_byte_alphabet
from tests.tokenizer.builders import BYTE, CONTROL, CORPUS, NORMAL, UNKNOWN, USER_DEFINED, bpe_metadata, byte_alphabet, metadata

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(tokenizer: HFTokenizer, trainer: Any) -> tuple[list[str], list[str]]:
    """Tokens by id and merges of `tokenizer`, trained on the corpus."""
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def byte_level() -> tuple[HFTokenizer, Tokenizer]:
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=byte_alphabet(), show_progress=False)
    tokens, merges = trained(theirs, trainer)
    return theirs, Tokenizer.from_gguf(metadata("gpt2", tokens, merges=merges, pre="gpt-2"))


@given(text=st.one_of(st.text(max_size=50), st.sampled_from(CORPUS)))
def test_byte_level_equals_the_librarys(byte_level: tuple[HFTokenizer, Tokenizer], text: str) -> None:
    theirs, ours = byte_level
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids) == text


@pytest.fixture(scope="module")
def plain() -> tuple[HFTokenizer, Tokenizer]:
    """Gemma 4's kind: merges in a list, ▁ for spaces, runs of newlines apart, bytes for what is not in the vocabulary."""
    theirs = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    theirs.normalizer = normalizers.Replace(" ", "▁")
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<bos>", "<eos>", *BYTES], show_progress=False, max_token_length=12
    )
    tokens, merges = trained(theirs, trainer)
    assert any("▁" in merge.replace(" ", "")[1:] for merge in merges)  # tokens across spaces, as nothing was split before
    theirs.encode_special_tokens = True  # as text
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    return theirs, Tokenizer.from_gguf(
        metadata("gemma4", tokens, merges=merges, token_type=types, bos_token_id=1, unknown_token_id=0)
    )


@given(text=st.one_of(st.text("abceghnoqtuvx  .-=13\né", max_size=60), st.text(max_size=20), st.sampled_from(CORPUS)))
def test_plain_equals_the_librarys(plain: tuple[HFTokenizer, Tokenizer], text: str) -> None:
    theirs, ours = plain
    assert ours.encode(text, parse_special=False) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text, parse_special=False)) == text.replace("▁", " ")


def test_gemma4_always_begins_with_bos(plain: tuple[HFTokenizer, Tokenizer]) -> None:
    assert plain[1].add_bos and plain[1].encode("", add_special=True) == [1]


def test_a_run_of_newlines_in_the_vocabulary_needs_no_merges() -> None:
    tokens = ["<bos>", "\n", "\n\n\n", "a", "▁a"]
    made = metadata("gemma4", tokens, merges=["▁ a"], token_type=[CONTROL, *[NORMAL] * 4], bos_token_id=0)
    assert Tokenizer.from_gguf(made).encode("a\n\n\na\n\n") == [3, 2, 3, 1, 1]


def test_whole_words_skip_merging_where_the_name_says_so() -> None:
    merges = ["a b", "c d"]
    for pre, texts in (("llama-bpe", ["abcd"]), ("qwen2", ["ab", "cd"])):
        tokenizer = Tokenizer.from_gguf(bpe_metadata(merges, {"abcd": NORMAL}, pre=pre))
        assert [tokenizer.token_text(id) for id in tokenizer.encode("abcd")] == texts


def test_user_defined_tokens_are_text_and_found_always() -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata([], {"<tool é>": USER_DEFINED, "<|x|>": CONTROL}))
    tool = tokenizer.vocab_size - 2
    assert tokenizer.encode("<tool é><|x|>", parse_special=False)[0] == tool
    assert tokenizer.encode("<tool é><|x|>") == [tool, tool + 1]
    assert tokenizer.decode([tool, tool + 1]) == "<tool é>"
    assert tokenizer.decode([tool, tool + 1], skip_special=False) == "<tool é><|x|>"


def test_byte_alphabet() -> None:
    assert {chr(point) for point in BYTE_OF} == set(byte_alphabet()) and sorted(BYTE_OF.values()) == list(range(256))
    assert decode_byte_alphabet("Ġé") == b" \xe9" and decode_byte_alphabet("日") == "日".encode()


@pytest.mark.parametrize("merges", [["ab"], ["a b c"], [""], ["a  b"], ["x zz"], [7], "a b"])
@pytest.mark.parametrize("model", ["gpt2", "gemma4"])
def test_malformed_merges(model: str, merges: Any) -> None:
    made = {**bpe_metadata([]), "tokenizer.ggml.model": model, "tokenizer.ggml.merges": merges}
    if model == "gemma4" and merges in (["a b c"], ["a  b"], ["x zz"]):
        assert Tokenizer.from_gguf(made).encode("a b")  # well-formed there: tokens may hold spaces, and unknown ones never meet
        return
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf(made)


def test_missing_merges() -> None:
    made = bpe_metadata([])
    del made["tokenizer.ggml.merges"]
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.merges: is missing"):
        Tokenizer.from_gguf(made)
