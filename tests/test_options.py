"""Options: table, coercion, warnings, the text form of Modelfiles."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ollamapy.api.options import DEPRECATED, OPTIONS, Options, merge, parse_text
from ollamapy.errors import OptionError


def test_table_and_struct_agree() -> None:
    defaults = msgspec.structs.asdict(Options())
    assert defaults == {name: option.default for name, option in OPTIONS.items()}


def test_later_layers_win_and_null_is_skipped() -> None:
    model = {"temperature": 0.1, "top_k": 7, "stop": ["a"]}
    options, warnings = merge({"num_ctx": 8192}, model, {"temperature": 1, "top_k": None, "stop": ["b", "c"]})
    assert (options.num_ctx, options.temperature, options.top_k, options.stop) == (8192, 1.0, 7, ("b", "c"))
    assert isinstance(options.temperature, float) and warnings == []


@pytest.mark.parametrize(("given", "used"), [(0, 4), (-5, 4), (3.9, 4), (4, 4), (4096.7, 4096)])
def test_num_ctx_at_least_four(given: float, used: int) -> None:
    assert merge({"num_ctx": given})[0].num_ctx == used


def test_unset_num_ctx_is_automatic() -> None:
    assert merge({}, {"num_ctx": None})[0].num_ctx == 0


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_ctx", "1", "must be of type integer"),
        ("num_ctx", True, "must be of type integer"),
        ("num_ctx", [], "must be of type integer"),
        ("seed", {}, "must be of type integer"),
        ("seed", math.nan, "must be of type integer"),
        ("top_k", math.inf, "must be of type integer"),
        ("top_k", 2**31, "is out of range"),
        ("top_k", 1e308, "is out of range"),
        ("seed", 2**63, "is out of range"),
        ("temperature", "hot", "must be of type float32"),
        ("temperature", False, "must be of type float32"),
        ("temperature", math.nan, "must be of type float32"),
        ("temperature", 1e308, "must be of type float32"),
        ("temperature", 10**400, "must be of type float32"),
        ("use_mmap", 1, "must be of type boolean"),
        ("stop", "x", "must be of type array"),
        ("stop", ["x", 1], "must be of an array of strings"),
        ("stop", ["x"] * 17, "takes at most 16 texts of at most 1024 characters"),
        ("stop", ["x" * 1025], "takes at most 16 texts of at most 1024 characters"),
        ("dry_sequence_breakers", ["x"] * 65, "takes at most 64 texts of at most 1024 characters"),
    ],
)
def test_wrong_types(name: str, value: Any, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        merge({name: value})
    assert str(caught.value) == f'option "{name}" {text}'
    assert caught.value.status == 400


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.kind in ("int", "float")])
@pytest.mark.parametrize("value", [-1, 0, 2**31, 2**63, math.nan, math.inf, 1e308, "1", [], {}, True])
def test_numbers_are_taken_or_refused_never_wrapped(name: str, value: Any) -> None:
    try:
        result = getattr(merge({name: value})[0], name)
    except OptionError:
        return
    assert result == value or name == "num_ctx"


def test_large_seed() -> None:
    assert merge({"seed": 2**63 - 1})[0].seed == 2**63 - 1


@pytest.mark.parametrize("name", sorted(DEPRECATED))
def test_deprecated_names_warn(name: str) -> None:
    options, warnings = merge({name: "anything"}, {name: 1})
    assert options == Options() and len(warnings) == 1 and name in warnings[0]


def test_unknown_names_warn() -> None:
    assert merge({"tempature": 1}) == (Options(), ['invalid option provided: "tempature"'])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_ctx", "4096", 4096),
        ("num_keep", "-1", -1),
        ("seed", "+7", 7),
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_p", ".5", 0.5),
        ("top_p", "1e-1", 0.1),
        ("use_mmap", "t", True),
        ("use_mmap", "False", False),
        ("stop", "<|im_end|>", ["<|im_end|>"]),
    ],
)
def test_text_form(name: str, text: str, value: Any) -> None:
    parsed = parse_text(name, [text])
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("temperature", ["x"], "invalid float value [x]"),
        ("temperature", ["nan"], "invalid float value [nan]"),
        ("temperature", ["1e999"], "invalid float value [1e999]"),
        ("num_ctx", ["1.5"], "invalid int value [1.5]"),
        ("num_ctx", ["1_000"], "invalid int value [1_000]"),
        ("num_ctx", ["٣"], "invalid int value [٣]"),
        ("num_ctx", ["9" * 5000], f"invalid int value [{'9' * 5000}]"),
        ("num_ctx", ["x", "y"], "invalid int value [x y]"),
        ("use_mmap", ["yes"], "invalid bool value [yes]"),
        ("nope", ["1"], "unknown parameter 'nope'"),
    ],
)
def test_text_errors(name: str, values: list[str], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_text(name, values)
    assert str(caught.value) == text


def test_several_stops() -> None:
    assert parse_text("stop", ["a", "b"]) == ["a", "b"]
