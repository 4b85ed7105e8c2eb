"""How much an expression of a Jinja template may make: sizes of values, and of results before they are made.

Python's own operators and methods know no limits, so each one whose result may be far larger than its arguments is
estimated here first. Nothing here knows templates or environments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from ollamapy.chat.budget import MAX_DEPTH
from ollamapy.errors import TemplateError

MAX_NUMBER = 100_000  # widths, counts and precisions given to methods and filters
MAX_BITS = 4096  # of an integer
MAX_ITEMS = 1 << 18  # elements that any value may expand to, however often they are shared
_BLOCKED = frozenset({"maketrans", "striptags", "to_bytes", "translate", "unescape"})
_WIDTH = re.compile(r"[0-9]{5,}")
_NESTED_FIELD = re.compile(r"\{[^{}]*:[^{}]*\{")


def weight(value: Any) -> int:
    """Characters and elements `value` expands to; as `{{ value }}` it prints at least so many. At most about MAX_OUTPUT.

    Raises TemplateError for a value that expands to too many elements or nests too deep: comparing, hashing and
    printing expand shared parts again and again, and Python does so without looking up.
    """
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (list, tuple, dict, set, frozenset, Namespace)):
        return 8
    left = [MAX_ITEMS]
    return _expand(value, left, 0)


def _expand(value: Any, left: list[int], depth: int) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, dict):
        children: Any = [*value.keys(), *value.values()] if len(value) <= left[0] else ()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = value
    else:
        return 8
    left[0] -= max(len(value), 1)
    if left[0] < 0 or depth > MAX_DEPTH:
        raise TemplateError(f"template made a value of more than {MAX_ITEMS} elements or {MAX_DEPTH} levels")
    return 4 * len(value) + sum([_expand(child, left, depth + 1) for child in children])


def check_number(value: Any) -> None:
    """Refuses a large integer as an argument: a width, a count, a precision."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise TemplateError(f"template uses the number {value:.3g} as an argument, more than {MAX_NUMBER}")


def method_result(owner: str | bytes, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """At least the size of what `owner.name(*args, **kwargs)` makes."""
    if name in _BLOCKED:
        raise SecurityError(f"templates may not use {name}()")
    for argument in (*args, *kwargs.values()):
        check_number(argument)
    if name in ("format", "format_map"):
        return formatted(str(owner), "{", args, kwargs)
    if name == "join" and args:
        items = args[0] if isinstance(args[0], (list, tuple, dict, str, bytes)) else range(MAX_ITEMS)
        return len(owner) * len(items) + weight(args[0])
    if name == "replace" and len(args) >= 2:
        return replaced(owner, args[0], args[1])
    if name == "expandtabs":
        return len(owner) * (args[0] if args and isinstance(args[0], int) else kwargs.get("tabsize", 8))
    if name in ("split", "rsplit", "splitlines"):
        return 8 * len(owner)
    return len(owner) + sum(argument for argument in args if isinstance(argument, int))


def replaced(text: Any, old: Any, new: Any) -> int:
    """Size of `text` with `new` for every `old`."""
    if not isinstance(text, (str, bytes)) or not isinstance(old, type(text)) or not isinstance(new, (str, bytes)):
        return max(weight(text), 1) * max(weight(new), 1)
    return len(text) + text.count(old) * len(new)  # type: ignore[arg-type]


def formatted(template: str, mark: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Size of a format string's result: every field may be the largest argument. Wide fields are refused."""
    if _WIDTH.search(template) or _NESTED_FIELD.search(template) or (mark == "%" and "*" in template):
        raise TemplateError("template uses a format with a width or precision that is too large or not fixed")
    largest = max((weight(value) for value in (*args, *kwargs.values())), default=0)
    return len(template) + template.count(mark) * (largest + 10_000 * bool(re.search(r"[0-9]{4}", template)))


def product(left: Any, right: Any) -> int:
    """Size of `left * right`; raises for integers that would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return 8
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
            return max(count, 0) * max(weight(sequence), 1)
    return 8


def power(base: Any, exponent: Any) -> int:
    """Raises when `base ** exponent` would be too large an integer."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)
    return 8


def remainder(left: Any, right: Any) -> int:
    """Size of `left % right`, which formats when `left` is text."""
    if isinstance(left, (str, bytes)):
        values = right if isinstance(right, tuple) else (right,)
        return formatted(str(left), "%", values, {})
    return 8


def total(left: Any, right: Any) -> int:
    """Size of `left + right`."""
    sized = isinstance(left, (str, bytes, list, tuple)) and isinstance(right, (str, bytes, list, tuple))
    return weight(left) + weight(right) if sized else 8


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateError(f"template made an integer of more than {MAX_BITS} bits")


OPERATORS: dict[str, Callable[[Any, Any], int]] = {"*": product, "**": power, "%": remainder, "+": total}
"""Operators whose results are estimated before they are computed."""
