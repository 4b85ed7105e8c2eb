"""The table of pre-tokenizers: all compile, and split as their models' own files do."""

from __future__ import annotations

import time

import pytest
from tokenizers import Regex, pre_tokenizers

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer.pretokenize import PRETOKENIZERS, pretokenizer


def split(name: str, text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pretokenizer(name).patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_name_splits_without_loss(name: str) -> None:
    text = "I'll say 12345 thIngs—ça va?\r\n\n  ok\t你好ÀÉ한국 ½ x_y {}\u0e40\u0e01 'S "
    assert "".join(split(name, text)) == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("llama3", "I'Ll take 12345.\n\n  x", "I|'Ll| take| |123|45|.\n\n| | x"),
        ("qwen2", "a1234 b!!\n", "a|1|2|3|4| b|!!\n"),
        ("ufakzeka", "Ankara'da 12", "Ankara|'da| |1|2"),
        ("qwen35", "n\u0301a 12", "n\u0301a| |1|2"),
        ("laguna", "a\n\nb", "a|\n\n|b"),
        ("minicpm5", "v12345", "v|123|45"),
        ("seed-coder", "x!!\n", "x|!!|\n"),
        ("bailingmoe", "it's\n\na\n!\n\n", "it|'s|\n\n|a|\n|!\n\n"),
        ("exaone-moe", "a b cd", "a b cd"),
        ("tekken", "HelloWorld JSONFile 12", "Hello|World| JSONFile| |1|2"),
        ("gpt-4o", "HelloWorld's 12345 a/b/\n", "Hello|World's| |123|45| a|/b|/\n"),
        ("tiny_aya", "n=1234567, 12345abc 42", "n|=|1|234|567|,| |123|45|abc| |42"),
        ("youtu", "abc你好12가나", "abc|你好|1|2|가나"),
        ("deepseek-v3", "x.size() 12345 日本x", "x|.size|()| |123|45| |日本|x"),
        ("spark2_5", "a!\n\nb", "a|!|\n|\n|b"),
        ("deepseek-llm", "Über 123\nx é 你好", "Ü|ber| |123|\n|x| é| |你好"),  # its symbols run from : to ~, letters included
        ("deepseek-coder", "ab, 12\n", "ab|,| |1|2|\n"),
        ("gpt-2", "it's 123  x", "it|'s| 123| | x"),
        ("starcoder", "a 12", "a| |1|2"),
        ("falcon", "a-b 12345", "a|-|b| |123|45"),
        ("default", "a=1234", "a|=|123|4"),
        ("bloom", "a, b", "a|,| b"),
        ("viking", "ab12", "ab|1|2"),
        ("chameleon", "a\tb IMGIMGACZ", "a|\t|b| |IMGIMGACZ"),
        ("superbpe", "at 1234567 and 123", "at |1|234|567| and |123"),
        ("kimi-k2", "你好abc 1234", "你好|abc| |123|4"),
        ("afmoe", "x1234567 日本ok", "x|1|234|567| |日本|ok"),
        ("jais-2", "a" + " " * 6 + "b", "a|    | | b"),
    ],
)
def test_splits(name: str, text: str, pieces: str) -> None:
    assert split(name, text) == pieces.split("|")


@pytest.mark.parametrize("name", ["superbpe", "afmoe", "tiny_aya"])
def test_long_numbers_take_linear_time(name: str) -> None:
    started = time.perf_counter()
    assert split(name, "1" * 100_000)[:3] == ["1", "111", "111"]
    assert time.perf_counter() - started < 5  # 0.1 s; hours if every digit looked to the end


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre: unknown pre-tokenizer 'qwen99'"):
        pretokenizer("qwen99")
