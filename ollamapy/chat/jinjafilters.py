"""Jinja's filters and tests with limits: each charges the render's budget for what it reads and what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.tests import TESTS

from ollamapy.chat.budget import MAX_OUTPUT, Budget
from ollamapy.chat.jinjalimits import check_number, formatted, method_result, replaced, weight
from ollamapy.errors import TemplateError

Function = Callable[..., Any]
UNSAFE_FILTERS = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
"""Left out: quadratic in their text, or of no use in a prompt."""
_COMPARISONS = {"eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="}
_COSTLY_TESTS = frozenset({"in", "upper", "lower", *_COMPARISONS})
_LAZY = {"map", "reject", "rejectattr", "select", "selectattr"}
_READS_LENGTH_ONLY = frozenset({"count", "default", "d", "first", "items", "last", "length", *_LAZY})


def budget_of(context: Context) -> Budget:
    budget: Budget = context.budget  # type: ignore[attr-defined]
    return budget


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of chat templates: plain JSON, no HTML escapes, keys in their order."""
    if any(len(text) > 64 for text in separators or ()) or (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise TemplateError("tojson: indent or separators are too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indented(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    width = args[1] if len(args) > 1 else kwargs.get("width", 4)
    size = len(width) if isinstance(width, str) else int(width)
    return len(str(args[0])) + (str(args[0]).count("\n") + 1) * size


def _joined(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return method_result(str(args[1] if len(args) > 1 else kwargs.get("d", "")), "join", args, {})


def _summed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    start = args[2] if len(args) > 2 else kwargs.get("start", 0)
    if not isinstance(start, (int, float)):
        raise TemplateError("sum: only numbers can be added up")
    return 8


_ESTIMATES: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], int]] = {
    "indent": _indented,
    "join": _joined,
    "sum": _summed,
    "replace": lambda args, kwargs: replaced(str(args[0]), *[str(arg) for arg in args[1:3]]) if len(args) > 2 else MAX_OUTPUT,
    "format": lambda args, kwargs: formatted(str(args[0]), "%", args[1:], kwargs),
    "tojson": lambda args, kwargs: 2 * weight(args[0]),
}


def _limited(name: str, function: Function) -> Function:
    """`function` with the same arguments, charged to the budget of the context it runs in."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    estimate = _ESTIMATES.get(name)
    shallow = name in _READS_LENGTH_ONLY

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(context)
        for index, arg in enumerate((*args, *kwargs.values())):
            if index:
                check_number(arg)
            if isinstance(arg, str):
                budget.make(len(arg))
            elif isinstance(arg, (list, tuple, dict)):
                budget.make(len(arg) if shallow else weight(arg))
            elif hasattr(arg, "__len__"):
                budget.make(len(arg))
            else:
                budget.step(300 if hasattr(arg, "__next__") else 1)  # an iterator's length is not known: look at the clock
        if estimate is not None:
            budget.make(estimate(args, kwargs))
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        result = function(*first.get(passed, ()), *args, **kwargs)
        return made(budget, result)

    return run


def made(budget: Budget, result: Any) -> Any:
    """`result`, charged for."""
    if isinstance(result, str):
        budget.make(len(result))
    elif isinstance(result, (list, tuple, dict)):
        budget.make(weight(result))
    return result


def limited_filters() -> dict[str, Any]:
    filters: dict[str, Any] = {name: function for name, function in FILTERS.items() if name not in UNSAFE_FILTERS}
    return {name: _limited(name, function) for name, function in {**filters, "tojson": to_json}.items()}


def limited_tests() -> dict[str, Any]:
    tests: dict[str, Any] = dict(TESTS)
    return {name: _limited(name, test) if name in _COSTLY_TESTS else test for name, test in tests.items()}
