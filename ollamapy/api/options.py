"""The `options` object and `PARAMETER`: names, types, defaults, coercion. Knows nothing of what an engine does with them.

JSON numbers without a fraction are good for floats, and floats are truncated for integers, as in Ollama. An unknown or
deprecated name is a warning, never an error, in `options`; a wrong type is an OptionError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from ollamapy.errors import OptionError

Kind = Literal["int", "float", "bool", "strings", "text", "speculation"]
Speculation = Literal["auto", "ngram", "draft", "off"]

MIN_NUM_CTX = 4
MAX_TEXTS = {"stop": 16, "dry_sequence_breakers": 64}  # each is looked for in every token's text
MAX_TEXT = 1024  # characters of one
_INT32, _INT64 = 1 << 31, 1 << 63
_FLOAT32_MAX = 3.4028234663852886e38
_TYPE_NAMES = {"int": "integer", "float": "float32", "bool": "boolean", "strings": "array", "text": "string"}
_SPECULATIONS: tuple[Speculation, ...] = get_args(Speculation)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")

_NO_LONGER_SAMPLING = ("penalize_newline", "tfs_z")
_NO_LONGER_RUNNING = ("low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "numa")
DEPRECATED = frozenset((*_NO_LONGER_SAMPLING, *_NO_LONGER_RUNNING))
"""Once options of Ollama: accepted with a warning, without effect."""


class Option(NamedTuple):
    kind: Kind
    default: Any
    help: str


OPTIONS: dict[str, Option] = {
    "num_ctx": Option("int", 0, "Context length in tokens; 0: chosen by memory and model"),
    "num_batch": Option("int", 512, "Prompt tokens processed in one step"),
    "num_gpu": Option("int", -1, "Layers on the GPU; -1: as many as fit, 0: none"),
    "main_gpu": Option("int", None, "Use only this GPU"),
    "use_mmap": Option("bool", None, "Map the model file into memory"),
    "num_thread": Option("int", 0, "CPU threads; 0: one per physical core"),
    "precise": Option("bool", None, "Compute to the precision of float32; slower"),
    "speculation": Option("speculation", "auto", "Where guesses of tokens ahead come from: auto, ngram, draft or off"),
    "draft_num_predict": Option("int", -1, "Most tokens guessed ahead; 0: off, -1: as many as pay"),
    "num_keep": Option("int", 4, "Prompt tokens kept when the context is shifted; -1: all"),
    "seed": Option("int", -1, "Random number seed; -1: a new one each time"),
    "num_predict": Option("int", -1, "Most tokens to generate; -1: until a stop"),
    "top_k": Option("int", 40, "Sample from the k likeliest tokens; 0: all"),
    "top_p": Option("float", 0.9, "Sample from the likeliest tokens that add up to this probability; 1: all"),
    "min_p": Option("float", 0.0, "Least probability of a token relative to the likeliest"),
    "typical_p": Option("float", 1.0, "Locally typical sampling; 1: off"),
    "repeat_last_n": Option("int", 64, "Tokens looked back at for repetitions; 0: off, -1: the whole context"),
    "temperature": Option("float", 0.8, "Randomness; 0: always the likeliest token"),
    "repeat_penalty": Option("float", 1.0, "How strongly repetitions are penalised; 1: not at all"),
    "presence_penalty": Option("float", 0.0, "Penalty for tokens that occurred"),
    "frequency_penalty": Option("float", 0.0, "Penalty for tokens, per occurrence"),
    "mirostat": Option("int", 0, "Keeps surprise near mirostat_tau instead of top_k to xtc: 1, 2 its versions, 0: off"),
    "mirostat_tau": Option("float", 5.0, "Bits of surprise that mirostat aims at"),
    "mirostat_eta": Option("float", 0.1, "How fast mirostat follows"),
    "dry_multiplier": Option("float", 0.0, "Penalty for going on with a repetition (DRY); 0: off"),
    "dry_base": Option("float", 1.75, "Growth of the DRY penalty per repeated token"),
    "dry_allowed_length": Option("int", 2, "Tokens that may be repeated before DRY begins"),
    "dry_penalty_last_n": Option("int", -1, "Tokens that DRY looks back at; 0: off, -1: the whole context"),
    "dry_sequence_breakers": Option("strings", ("\n", ":", '"', "*"), "Texts that end a repetition for DRY"),
    "xtc_probability": Option("float", 0.0, "How often the likeliest of several likely tokens are left out (XTC); 0: never"),
    "xtc_threshold": Option("float", 0.1, "Probability that makes a token likely for XTC; above 0.5: off"),
    "grammar": Option("text", "", "GBNF or Lark grammar that every answer is held to"),
    "stop": Option("strings", (), "Text that ends the answer; may be given several times"),
}


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All options, resolved. Defaults and meanings are those of `OPTIONS`."""

    num_ctx: int = 0
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int = 0
    precise: bool | None = None
    speculation: Speculation = "auto"
    draft_num_predict: int = -1
    num_keep: int = 4
    seed: int = -1
    num_predict: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    temperature: float = 0.8
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    grammar: str = ""
    stop: tuple[str, ...] = ()


def merge(*layers: Mapping[str, object]) -> tuple[Options, list[str]]:
    """Later layers win: environment, then the model's parameters, then the request's options.

    Returns the options and the warnings to show. null values are skipped. Raises OptionError.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for layer in layers:
        for name, value in layer.items():
            if name in OPTIONS:
                if value is not None:
                    values[name] = coerce(name, value)
            elif name in DEPRECATED:
                warnings.append(f'option "{name}" is deprecated and has no effect')
            else:
                warnings.append(f'invalid option provided: "{name}"')
    if "num_ctx" in values:
        values["num_ctx"] = max(values["num_ctx"], MIN_NUM_CTX)
    return Options(**values), list(dict.fromkeys(warnings))


def coerce(name: str, value: object) -> Any:
    """`value`, as decoded from JSON, in the type of the option. Raises OptionError; `name` must be in `OPTIONS`."""
    kind = OPTIONS[name].kind
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int" and number and math.isfinite(value):  # type: ignore[arg-type]
        limit = _INT64 if name == "seed" else _INT32
        integer = int(value)  # type: ignore[call-overload]
        if -limit <= integer < limit:
            return integer
        raise OptionError(f'option "{name}" is out of range')
    if kind == "float" and number and -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "strings" and isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise OptionError(f'option "{name}" must be of an array of strings')
        if len(value) > MAX_TEXTS[name] or max(map(len, value), default=0) > MAX_TEXT:
            raise OptionError(f'option "{name}" takes at most {MAX_TEXTS[name]} texts of at most {MAX_TEXT} characters')
        return tuple(value)
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "speculation":
        if value in _SPECULATIONS:
            return value
        raise OptionError(f'option "{name}" must be one of {", ".join(_SPECULATIONS)}')
    raise OptionError(f'option "{name}" must be of type {_TYPE_NAMES[kind]}')


def parse_text(name: str, values: Sequence[str]) -> Any:
    """The value of `PARAMETER name value` or `/set parameter name value...`; a list of strings for `stop`.

    Raises OptionError. Callers test for DEPRECATED names before.
    """
    option = OPTIONS.get(name)
    if option is None or not values:
        raise OptionError(f"unknown parameter '{name}'")
    text, shown = values[0], " ".join(values)
    if option.kind == "strings":
        return list(values)
    if option.kind == "int":
        if not _INTEGER.fullmatch(text) or len(text) > 20:  # 2^63 has 19 digits
            raise OptionError(f"invalid int value [{shown}]")
        return coerce(name, int(text))
    if option.kind == "float":
        if not _FLOAT.fullmatch(text) or abs(float(text)) > _FLOAT32_MAX:
            raise OptionError(f"invalid float value [{shown}]")
        return float(text)
    if option.kind in ("speculation", "text"):
        return coerce(name, text)
    if text not in _TRUE + _FALSE:
        raise OptionError(f"invalid bool value [{shown}]")
    return text in _TRUE
