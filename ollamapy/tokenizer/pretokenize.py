"""How text is cut before byte-pair merging: every known `tokenizer.ggml.pre` with its regular expressions and rules.

The expressions are in Oniguruma's syntax and apply one after another, each isolating its matches inside the pieces that
the one before left. A name that is not here is an error: a wrong split degrades a model without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ollamapy.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """`patterns` and what a name implies besides: words found whole in the vocabulary skip merging (`ignore_merges`),
    bos is added unless a key says otherwise (`add_bos`), there is no default bos (`no_bos`), or merges run on plain
    text with ▁ for spaces, which only runs of newlines cut, instead of on the byte alphabet (`plain`)."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    no_bos: bool = False
    plain: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf"{_SYMBOLS}|{_BLANKS}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_JAIS2_BLANKS = "|".join([*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")), r"\s{1}"])
_JAIS2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|{_JAIS2_BLANKS}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
_BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased_words(suffix: str, digits: str, *, minus: str = "", slash: str = "/") -> str:
    """Words that change from upper to lower case at most once; `minus` is intersected with both letter classes."""
    upper, lower, lead = rf"[{_UPPER}{minus}]", rf"[{_LOWER}{minus}]", r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|{_BLANKS}"


_TEKKEN = _cased_words("", r"\p{N}")
_GPT4O = _cased_words(_CONTRACTION + "?", r"\p{N}{1,3}")
_KIMI_K2 = r"[\p{Han}]+|" + _cased_words(_CONTRACTION + "?", r"\p{N}{1,3}", minus=r"&&[^\p{Han}]", slash="")


def _ranges(points: str) -> str:
    """The inside of a character class, of hexadecimal code points and ranges."""
    return "".join("-".join(rf"\x{{{end}}}" for end in part.split("-")) for part in points.split())


_KANA = _ranges("3040-309F 30A0-30FF")
_CJK_RUN = rf"[{_ranges('4E00-9FA5')}{_KANA}]+"
_ASCII_SYMBOL = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3_WORD = rf"{_ASCII_SYMBOL}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORD}[\r\n]*|{_BLANKS}"
_SPARK = rf"{_DEEPSEEK3_WORD}|[\r\n]|\s+(?!\S)|\s+"
_CASED_LETTERS = _ranges(  # as DeepSeek's own file lists them
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_CJK_WIDE = rf"[{_ranges('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_WIDE_SYMBOLS = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_WIDE_SYMBOLS}]+", r"\s+$", _CJK_WIDE, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WIDE, r"\p{N}")
_YOUTU_RUNS = "|".join(
    [
        rf"[{_ranges('AC00-D7A3 3131-318E')}]+",
        rf"[{_ranges('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+",
        rf"[{_ranges('3105-312F')}]+",
        _CJK_RUN,
    ]
)
_ASIAN_RUN = _ranges(
    "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F AA60-AA7F "
    "A9E0-A9FF AC00-D7AF 1100-11FF"
)
# Digits in threes from the right, on pieces that hold one run of digits: only the piece's start looks ahead, so a
# run of n digits costs n steps. The published forms look to the run's end at every digit (2.8 s for 30,000 digits).
_THREES = r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)|\p{N}{3}"
_BLOOM = rf" ?[^(\s|.,!?{_ranges('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)


def _groups() -> Iterator[tuple[str, Pretokenizer]]:
    """(names, rules) of every group."""
    yield (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    )
    yield "dbrx smaug-bpe", Pretokenizer((_LLAMA3,))
    yield "chatglm-bpe", Pretokenizer((_LLAMA3,), no_bos=True)
    yield "glm4 glm5", Pretokenizer((_LLAMA3,), ignore_merges=True, no_bos=True)
    yield "jais-2", Pretokenizer((_JAIS2,))
    yield "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", Pretokenizer((_QWEN2,))
    yield "ufakzeka", Pretokenizer((rf"{_WORD}|\p{{N}}|{_TAIL}",))
    yield "qwen35", Pretokenizer((_QWEN35,))
    yield "laguna", Pretokenizer((r"[^\n]+|[\n]+", _QWEN2))
    yield "minicpm5", Pretokenizer((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_TAIL}"), ignore_merges=True)
    yield "seed-coder", Pretokenizer((_SEED_CODER,))
    yield "bailingmoe bailingmoe2 llada-moe", Pretokenizer((_BAILING,))
    yield "exaone-moe", Pretokenizer((_EXAONE_MOE,))
    yield "tekken", Pretokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)
    yield "gpt-4o llama4 kanana2 talkie minimax-m2", Pretokenizer((_GPT4O,))
    yield "granite-embed-multi-97m", Pretokenizer((_GPT4O,), ignore_merges=True)
    yield "tiny_aya cohere2moe", Pretokenizer((r"(?<!\d)\d+\b", _THREES, _GPT4O))
    yield "youtu", Pretokenizer((_YOUTU_RUNS, _cased_words(_CONTRACTION + "?", r"\p{N}")), ignore_merges=True)
    yield "deepseek-v3 hunyuan-dense joyai-llm hy_v4", Pretokenizer((r"\p{N}{1,3}", _CJK_RUN, _DEEPSEEK3))
    yield "spark2_5", Pretokenizer((r"\p{N}{1,3}", _CJK_RUN, _SPARK, r"\p{N}"))
    yield "deepseek-llm", Pretokenizer(_DEEPSEEK_LLM)
    yield "deepseek-coder", Pretokenizer(_DEEPSEEK_CODER)
    yield (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
        "modern-bert mpt olmo jais trillion granite-docling exaone4",
        Pretokenizer((_GPT2,)),
    )
    yield (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        Pretokenizer((r"\p{N}", _GPT2)),
    )
    yield "falcon", Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))
    yield "default", Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
    yield "bloom poro-chat gpt3-finnish", Pretokenizer((_BLOOM,))
    yield "viking", Pretokenizer((_BLOOM, r"\p{N}"))
    yield "chameleon", Pretokenizer(_CHAMELEON, add_bos=True)
    yield "superbpe", Pretokenizer((r"\p{N}+", _THREES))
    yield "kimi-k2", Pretokenizer((_KIMI_K2,))
    yield "afmoe", Pretokenizer((r"\p{N}+", _THREES, rf"[{_ASIAN_RUN}]+", _DEEPSEEK3))
    yield "gemma4 granite-embed-multi-311m sarvam-moe", Pretokenizer((), plain=True)


PRETOKENIZERS: dict[str, Pretokenizer] = {name: rules for names, rules in _groups() for name in names.split()}


def pretokenizer(name: str) -> Pretokenizer:
    """The rules of `tokenizer.ggml.pre` = `name`. Raises TokenizerError that names an unknown one."""
    rules = PRETOKENIZERS.get(name)
    if rules is None:
        raise TokenizerError(f"tokenizer.ggml.pre: unknown pre-tokenizer {name!r}; known: {', '.join(sorted(PRETOKENIZERS))}")
    return rules
