"""The functions a template may call: Go's builtins and the ones Ollama adds. `and` and `or` belong to the executor.

Each takes the evaluated arguments and the budget; a wrong argument raises ValueError with Go's words for it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote_plus

from ollamapy.chat.budget import MAX_OUTPUT, Budget
from ollamapy.chat.gotemplate import json, printing
from ollamapy.chat.gotemplate.values import Struct, from_bytes, kind, to_bytes, truth, type_name

Arguments = Sequence[Any]


class Builtin(NamedTuple):
    call: Callable[[Arguments, Budget], Any]
    least: int
    most: int | None  # None: any number


def weight(value: Any, limit: int = MAX_OUTPUT) -> int:
    """At least the number of elements and characters that `value` expands to when printed; counts no further than `limit`."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, dict, Struct)):
        return 8
    total = 8
    items: Any = value if isinstance(value, list) else value.values if isinstance(value, Struct) else value
    for item in items.values() if isinstance(items, dict) else items:
        total += 8 + weight(item, limit - total)
        if total > limit:
            break
    return total


def _text(make: Callable[[str], str]) -> Callable[[Arguments, Budget], str]:
    """A function of its arguments' text."""

    def call(args: Arguments, budget: Budget) -> str:
        budget.make(sum(weight(arg) for arg in args))
        return make(printing.sprint(["<no value>" if arg is None else arg for arg in args]))

    return call


_HTML: dict[str, str | int | None] = {"\0": "\ufffd", '"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
_JS = {"\\": "\\\\", "'": "\\'", '"': '\\"', "<": "\\u003C", ">": "\\u003E", "&": "\\u0026", "=": "\\u003D"}


def _html(text: str) -> str:
    return text.translate(str.maketrans(_HTML))


def _js(text: str) -> str:
    pieces = []
    for character in text:
        escaped = _JS.get(character)
        if escaped is None and (character < " " or not (character.isprintable())):
            escaped = f"\\u{ord(character):04X}"
        pieces.append(escaped or character)
    return "".join(pieces)


def _urlquery(text: str) -> str:
    return quote_plus(to_bytes(text), safe="~")


def _print(args: Arguments, budget: Budget) -> str:
    budget.make(sum(weight(arg) for arg in args))
    return printing.sprint(args)


def _println(args: Arguments, budget: Budget) -> str:
    budget.make(sum(weight(arg) for arg in args))
    return printing.sprintln(args)


def _printf(args: Arguments, budget: Budget) -> str:
    if not isinstance(args[0], str):
        raise ValueError(f"wrong type for value; expected string; got {type_name(args[0])}")
    budget.make(sum(weight(arg) for arg in args))
    return printing.sprintf(args[0], args[1:], budget.make)


def _json(args: Arguments, budget: Budget) -> str:
    budget.make(weight(args[0]))
    return json.dumps(args[0])


def _bytes(text: str, budget: Budget) -> str | bytes:
    """What len, index and slice count in: bytes; of ASCII text its characters are as good, and cost nothing."""
    if text.isascii():
        return text
    budget.make(len(text))
    return to_bytes(text)


def _len(args: Arguments, budget: Budget) -> int:
    value = args[0]
    if isinstance(value, str):
        return len(_bytes(value, budget))
    if isinstance(value, (list, dict)):
        return len(value)
    raise ValueError("len of nil pointer" if value is None else f"len of type {type_name(value)}")


def _position(value: Any, length: int) -> int:
    """A list or string index, checked."""
    if value is None:
        raise ValueError("cannot index slice/array with nil")
    if kind(value) != "int":
        raise ValueError(f"cannot index slice/array with type {type_name(value)}")
    if not 0 <= value < length:
        raise ValueError(f"index out of range: {value}")
    return int(value)


def _index(args: Arguments, budget: Budget) -> Any:
    value = args[0]
    if value is None:
        raise ValueError("index of untyped nil")
    for key in args[1:]:
        if value is None:
            raise ValueError("index of nil pointer")
        if isinstance(value, dict):
            if not isinstance(key, str):
                raise ValueError(f"value has type {type_name(key)}; should be string")
            value = value.get(key)
        elif isinstance(value, list):
            value = value[_position(key, len(value))]
        elif isinstance(value, str):
            data = _bytes(value, budget)
            unit = data[_position(key, len(data))]
            value = ord(unit) if isinstance(unit, str) else unit
        else:
            raise ValueError(f"can't index item of type {type_name(value)}")
    return value


def _slice(args: Arguments, budget: Budget) -> Any:
    value, *bounds = args
    if value is None:
        raise ValueError("slice of untyped nil")
    if isinstance(value, str) and len(bounds) == 3:
        raise ValueError("cannot 3-index slice a string")
    if not isinstance(value, (str, list)):
        raise ValueError(f"can't slice item of type {type_name(value)}")
    items: Any = _bytes(value, budget) if isinstance(value, str) else value
    places = [_position(bound, len(items) + 1) for bound in bounds]
    first = places[0] if places else 0
    last = places[1] if len(places) > 1 else len(items)
    if first > last or (len(places) == 3 and last > places[2]):
        raise ValueError(f"invalid slice index: {first} > {last}")
    budget.make(last - first)
    part = items[first:last]
    return from_bytes(part) if isinstance(part, bytes) else part


def _equal(left: Any, right: Any) -> bool:
    left_kind, right_kind = kind(left), kind(right)
    if left_kind != right_kind:
        if "nil" in (left_kind, right_kind):
            return False
        raise ValueError("incompatible types for comparison")
    if left_kind == "other":
        raise ValueError(f"non-comparable type {printing.plain(left)[:80]}: {type_name(left)}")
    return bool(left == right)


def _eq(args: Arguments, budget: Budget) -> bool:
    return any(_equal(args[0], other) for other in args[1:])


def _less(left: Any, right: Any) -> bool:
    left_kind, right_kind = kind(left), kind(right)
    if left_kind in ("nil", "other", "bool") or right_kind in ("nil", "other"):
        raise ValueError("invalid type for comparison")
    if left_kind != right_kind:
        raise ValueError("incompatible types for comparison")
    return bool(left < right)


def _typescript(value: Any) -> str:
    """The TypeScript type of a tool's property; "any" for what is none."""
    if not isinstance(value, Struct) or "AnyOf" not in value.values:
        return "any"
    if value.values["AnyOf"]:
        return " | ".join([_typescript(option) for option in value.values["AnyOf"]])
    names = {"integer": "number", "array": "any[]", "object": "Record<string, any>"}
    same = ("string", "number", "boolean", "null")
    return " | ".join([names.get(name, name if name in same else "any") for name in value.values["Type"] or ()]) or "any"


def _date(args: Arguments, budget: Budget, days_ago: int = 0) -> str:
    return (datetime.date.today() - datetime.timedelta(days=days_ago)).isoformat()


def _call(args: Arguments, budget: Budget) -> Any:
    raise ValueError("call of nil" if args[0] is None else f"non-function of type {type_name(args[0])}")


BUILTINS: dict[str, Builtin] = {
    "and": Builtin(lambda args, budget: None, 1, None),
    "or": Builtin(lambda args, budget: None, 1, None),
    "not": Builtin(lambda args, budget: not truth(args[0]), 1, 1),
    "eq": Builtin(_eq, 2, None),
    "ne": Builtin(lambda args, budget: not _equal(args[0], args[1]), 2, 2),
    "lt": Builtin(lambda args, budget: _less(args[0], args[1]), 2, 2),
    "le": Builtin(lambda args, budget: _less(args[0], args[1]) or _equal(args[0], args[1]), 2, 2),
    "gt": Builtin(lambda args, budget: not _less(args[0], args[1]) and not _equal(args[0], args[1]), 2, 2),
    "ge": Builtin(lambda args, budget: not _less(args[0], args[1]), 2, 2),
    "len": Builtin(_len, 1, 1),
    "index": Builtin(_index, 1, None),
    "slice": Builtin(_slice, 1, 4),
    "print": Builtin(_print, 0, None),
    "println": Builtin(_println, 0, None),
    "printf": Builtin(_printf, 1, None),
    "html": Builtin(_text(_html), 0, None),
    "js": Builtin(_text(_js), 0, None),
    "urlquery": Builtin(_text(_urlquery), 0, None),
    "call": Builtin(_call, 1, None),
    "json": Builtin(_json, 1, 1),
    "currentDate": Builtin(_date, 0, None),
    "yesterdayDate": Builtin(lambda args, budget: _date(args, budget, 1), 0, None),
    "toTypeScriptType": Builtin(lambda args, budget: _typescript(args[0]), 1, 1),
}
