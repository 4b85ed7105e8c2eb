"""Special tokens: by key, by text and by default; ends of generation; what is put around a text; dialects of files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer import Tokenizer
from tests.tokenizer.builders import CONTROL, CORPUS, NORMAL, UNUSED, USER_DEFINED, bpe_metadata, metadata, spm_metadata


def made(added: dict[str, int], **keys: Any) -> Tokenizer:
    """Byte-level BPE without merges, and these tokens; keys' values that are texts of tokens become their ids."""
    ids = {text: 256 + n for n, text in enumerate(added)}
    keys = {key: ids.get(value, value) if isinstance(value, str) else value for key, value in keys.items()}
    return Tokenizer.from_gguf(bpe_metadata([], added, **keys))


def ends(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.token_text(id) for id in tokenizer.eog_ids}


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        ("<e> <x>", {"eos_token_id": "<e>"}, "<e>"),
        ("<e> <t> <m> <x>", {"eos_token_id": "<e>", "eot_token_id": "<t>", "eom_token_id": "<m>"}, "<e> <t> <m>"),
        ("<e> <|im_end|> <|eot_id|> </s>", {"eos_token_id": "<e>"}, "<e> <|im_end|> <|eot_id|> </s>"),
        ("<e> <f> <x>", {"eos_token_id": "<e>", "eos_token_ids": [256, 257]}, "<e> <f>"),
        (
            "<e> <|fim_pad|> <|repo_name|> <|file_sep|> <|fim_prefix|>",
            {"eos_token_id": "<e>"},
            "<e> <|fim_pad|> <|repo_name|> <|file_sep|>",
        ),
        ("<e> <p> <|fim_pad|>", {"eos_token_id": "<e>", "fim_pad_token_id": "<p>"}, "<e> <p>"),
        ("<|return|> <|call|> <|end|> <|channel|>", {"eos_token_id": "<|return|>"}, "<|return|> <|call|>"),  # gpt-oss
        ("<|flush|> <|calls|> <|end|>", {"eos_token_id": "<|flush|>"}, "<|flush|> <|calls|>"),  # Solar
        ("<|return|> <|end|>", {"eos_token_id": "<|return|>"}, "<|return|> <|end|>"),
        ("<eos> <turn|> <|tool_response> </s>", {"eos_token_id": "<eos>"}, "<eos> <turn|> <|tool_response>"),  # gemma4
    ],
)
def test_ends_of_generation(tokens: str, keys: dict[str, Any], expected: str) -> None:
    assert ends(made(dict.fromkeys(tokens.split(), CONTROL), **keys)) == set(expected.split())


def test_types_are_corrected_by_text() -> None:
    tokenizer = made(
        {"<|im_end|>": NORMAL, "<|channel|>": CONTROL, "<fim_prefix>": NORMAL, "<|end|>": CONTROL, "<|x|>": CONTROL}
    )
    control = {text: tokenizer.is_control(256 + n) for n, text in enumerate(["<|im_end|>", "<|channel|>", "<fim_prefix>"])}
    assert control == {"<|im_end|>": True, "<|channel|>": False, "<fim_prefix>": True}
    assert tokenizer.encode("<|im_end|>") == [256] and len(tokenizer.encode("<|im_end|>", parse_special=False)) > 1
    assert tokenizer.decode([256, 257, 258]) == "<|channel|>"
    assert tokenizer.special_ids["fim_pre"] == 258


def test_suppressed_ids() -> None:
    added = {
        "<unused0>": CONTROL,
        "<gone>": UNUSED,
        "<x>": CONTROL,
        "[PAD1]": NORMAL,
        "[PAD77]": USER_DEFINED,
        "[PAD78]": NORMAL,
    }
    assert made(added, suppress_tokens=[258, -1, 10**6]).suppress_ids == (257, 258, 259, 260, 261)


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({}, [256]),
        ({"add_bos_token": False}, []),
        ({"add_eos_token": True}, [256, 257]),
        ({"add_sep_token": True}, [256]),  # it is about pairs of texts
        ({"bos_token_id": "<e>", "add_eos_token": 1}, [257, 257]),
    ],
)
def test_frame(keys: dict[str, Any], ids: list[int]) -> None:
    tokens = {"<b>": CONTROL, "<e>": CONTROL, "<s>": CONTROL}
    tokenizer = made(
        tokens, **{"pre": "llama-bpe", "bos_token_id": "<b>", "eos_token_id": "<e>", "seperator_token_id": "<s>", **keys}
    )
    assert tokenizer.encode("", add_special=True) == ids
    assert tokenizer.encode("") == []
    framed = tokenizer.encode("ab", add_special=True)
    assert [id for id in framed if id >= 256] == ids and [id for id in framed if id < 256] == tokenizer.encode("ab")
    assert framed[:1] == (ids or framed)[:1]


def test_bos_and_eos_are_not_doubled() -> None:
    keys = {"bos_token_id": "<b>", "eos_token_id": "<e>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = made({"<b>": CONTROL, "<e>": CONTROL}, **keys)
    assert tokenizer.encode("<b>a<e>", add_special=True) == tokenizer.encode("a", add_special=True)
    assert tokenizer.encode("<b><b>a", add_special=True).count(256) == 2  # what the text asks for stays


@pytest.mark.parametrize(
    ("pre", "add_bos"), [("llama-bpe", True), ("tekken", True), ("chameleon", True), ("qwen2", False), ("smollm", False)]
)
def test_add_bos_follows_the_pre_tokenizer(pre: str, add_bos: bool) -> None:
    assert made({}, pre=pre).add_bos is add_bos


def test_default_ids() -> None:
    spm = Tokenizer.from_gguf(spm_metadata({}))
    assert (spm.bos_id, spm.eos_id, spm.special_ids["unk"], spm.add_bos, spm.add_eos) == (1, 2, 0, True, False)
    bpe = bpe_metadata([])
    del bpe["tokenizer.ggml.bos_token_id"], bpe["tokenizer.ggml.eos_token_id"]
    assert (Tokenizer.from_gguf(bpe).bos_id, Tokenizer.from_gguf(bpe).eos_id) == (11, 11)
    bpe["tokenizer.ggml.pre"] = "glm4"
    assert Tokenizer.from_gguf(bpe).bos_id is None


def test_ids_out_of_range_that_nothing_depends_on_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made({"<e>": CONTROL}, seperator_token_id=10**6, bos_token_id=0xFFFFFFFF, padding_token_id=-1)
    assert "sep" not in tokenizer.special_ids and tokenizer.bos_id == 11 and "pad" not in tokenizer.special_ids
    assert "seperator_token_id = 1000000" in caplog.text


@pytest.mark.parametrize("id", [300, -2])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"])
def test_ids_out_of_range_that_matter(key: str, id: int) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer\.ggml\.{key}: {id} is outside the vocabulary of 256 tokens"):
        made({}, **{key: id})


def test_a_frame_without_its_token() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.bos_token_id: is not set"):
        Tokenizer.from_gguf({**bpe_metadata([], pre="glm4", add_bos_token=True), "tokenizer.ggml.bos_token_id": -1})


# -- dialects ---------------------------------------------------------------------------------------------------------


def llama3(**keys: Any) -> dict[str, Any]:
    base = bpe_metadata([])
    tokens = base["tokenizer.ggml.tokens"] + [f"<r{n}>" for n in range(128256 - 256)]
    tokens[128009] = "<|eot_id|>"
    return metadata(
        "gpt2", tokens, merges=[], bos_token_id=128000, eos_token_id=128001, **{"general.architecture": "llama"}, **keys
    )


def test_llama3_files_without_a_pre_tokenizer() -> None:
    old = Tokenizer.from_gguf(llama3())
    assert (old.add_bos, old.eos_id) == (True, 128009) and {128001, 128009} >= old.eog_ids
    assert Tokenizer.from_gguf(llama3(pre="llama-bpe")).eos_id == 128001


@pytest.mark.parametrize(
    ("architecture", "pre", "text", "pieces"),
    [
        ("gptoss", None, "a's", 1),
        ("mistral3", "default", "HelloWorld", 2),
        ("lfm2", None, "12", 1),
        ("other", None, "1234", 2),
    ],
)
def test_pre_tokenizers_that_files_leave_out(architecture: str, pre: str | None, text: str, pieces: int) -> None:
    """Merges that make whole words show where text was cut."""
    base = bpe_metadata(["a '", "a' s", "H e", "He l", "Hel l", "Hell o", "W o", "Wo r", "Wor l", "Worl d", "1 2", "12 3"])
    del base["tokenizer.ggml.pre"]
    if pre is not None:
        base["tokenizer.ggml.pre"] = pre
    tokenizer = Tokenizer.from_gguf({**base, "general.architecture": architecture})
    assert len(tokenizer.encode(text)) == pieces


def test_gemma4_files_that_say_llama() -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "▁", "▁a"]
    types = [CONTROL] * 4 + [NORMAL] * 3
    ids = {"bos_token_id": 2, "eos_token_id": 1}
    base = metadata("llama", tokens, scores=[0.0] * 7, token_type=types, merges=["▁ a"], **ids)
    assert Tokenizer.from_gguf({**base, "general.architecture": "gemma4"}).encode("a a", add_special=True) == [2, 4, 6]


def test_tokens_without_an_embedding_are_dropped() -> None:
    base = spm_metadata({"▁a": -1.0, "b": -2.0}, {"<image>": CONTROL})
    whole, cut = Tokenizer.from_gguf(base), Tokenizer.from_gguf(base, embedding_rows=260)
    assert (whole.vocab_size, cut.vocab_size) == (262, 260)
    assert whole.encode("a<image>b")[1] == 261 and max(cut.encode("a<image>b")) < 260


def test_repeated_texts_keep_their_ids() -> None:
    base = spm_metadata({"▁a": -1.0})
    base["tokenizer.ggml.tokens"].append("▁a")
    base["tokenizer.ggml.scores"].append(-5.0)
    base["tokenizer.ggml.token_type"].append(NORMAL)
    tokenizer = Tokenizer.from_gguf(base)
    assert tokenizer.encode("a") == [259] and tokenizer.decode([260, 260]) == "a a"


def test_many_threads() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata({"▁t": -1.0, "he": -2.0, "▁the": -3.0, "▁": -4.0}, {"<|x|>": CONTROL}))
    texts = [f"{line}<|x|>{n}" for n in range(50) for line in CORPUS]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == alone
        assert list(pool.map(tokenizer.decode, alone)) == [tokenizer.decode(ids) for ids in alone]


@pytest.mark.parametrize(("text", "same"), [("a\ud83d\ude42", "a🙂"), ("\ud83da", "\ufffda"), ("a\x00b", "a\x00b")])
def test_text_that_json_can_bring(text: str, same: str) -> None:
    assert made({}).decode(made({}).encode(text)) == same
    spm = Tokenizer.from_gguf(spm_metadata({"▁": -1.0}))
    assert spm.decode(spm.encode(text)) == same
