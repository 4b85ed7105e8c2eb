"""JSON text as Go's encoding/json writes it: sorted map keys, HTML-safe escapes, shortest floats."""

from __future__ import annotations

import re
from typing import Any

from ollamapy.chat.gotemplate.floats import shortest
from ollamapy.chat.gotemplate.values import NilList, NilMap, OrderedMap, StringOrList, Struct, clean

_UNSAFE = re.compile('["\\\\\x00-\x1f<>&\u2028\u2029]')
_NAMED = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote(text: str) -> str:
    """`text` as a JSON string."""
    return '"' + _UNSAFE.sub(lambda match: _NAMED.get(match.group()) or f"\\u{ord(match.group()):04x}", clean(text)) + '"'


def dumps(value: Any) -> str:
    """`value` as JSON without spaces. Anything that is no Go value prints as null."""
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, (NilList, NilMap)):
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, StringOrList) and len(value) == 1:
        return quote(value[0])
    if isinstance(value, list):
        return "[" + ",".join([dumps(item) for item in value]) + "]"
    if isinstance(value, Struct):
        return _struct(value)
    keys = list(value) if isinstance(value, OrderedMap) else sorted(value)
    return "{" + ",".join([quote(key) + ":" + dumps(value[key]) for key in keys]) + "}"


def _struct(value: Struct) -> str:
    members = []
    for field, (name, omit_empty) in value.fields.items():
        item = value.values[field]
        if not (omit_empty and not isinstance(item, Struct) and not item):
            members.append(quote(name) + ":" + dumps(item))
    return "{" + ",".join(members) + "}"


def _float(value: float) -> str:
    """Exponents only below 1e-6 and from 1e21 on, as in ECMAScript."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-6 or magnitude >= 1e21):
        return re.sub(r"e-0(\d)$", r"e-\1", shortest(value, "e"))
    return shortest(value, "f")
