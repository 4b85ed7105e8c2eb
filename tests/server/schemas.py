"""JSON Schemas of many shapes, from a seed: what applications ask for, in every keyword that is promised."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "city", "count", "price", "tags", "owner", "status", "kind", "items", "size", "colour", "code", "active"]
Schema = dict[str, Any]
HANDMADE: list[Schema] = [
    {"$defs": {"Node": {"type": "object", "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9},
     "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}, "required": ["value", "next"],
     "additionalProperties": False}}, "$ref": "#/$defs/Node"},
    {"title": "Weather", "type": "object", "properties": {"city": {"title": "City", "type": "string", "maxLength": 12},
     "celsius": {"title": "Celsius", "type": "number", "minimum": -50, "maximum": 60, "default": 20},
     "sky": {"$ref": "#/$defs/Sky"}}, "required": ["city", "celsius", "sky"],
     "$defs": {"Sky": {"enum": ["clear", "cloudy", "rain"], "title": "Sky", "type": "string"}}},
    {"anyOf": [{"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9,
     "minimum": 1}}, "required": ["kind", "lives"], "additionalProperties": False},
     {"type": "object", "properties": {"kind": {"const": "dog"}, "good": {"const": True}}, "required": ["kind", "good"],
     "additionalProperties": False}]},
    {"type": "object", "patternProperties": {"^[a-c]$": {"type": "boolean"}}, "additionalProperties": False,
     "minProperties": 1},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 5}, "maxProperties": 2},
    {"enum": ["red", 5, None, True, {"a": [1, 2]}, 2.5]},
    {"const": {"nested": ["ü", "\"quoted\"", "line\nbreak"]}},
    {"type": "array", "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 99}, {"enum": ["m", "kg"]}],
     "items": False, "minItems": 2},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
     {"type": "object", "properties": {"a": {"type": "integer", "maximum": 7}, "b": {"type": "boolean"}},
      "required": ["b"], "additionalProperties": False}]},
    {"type": ["boolean", "null"]},
]  # fmt: skip


def random_schema(rng: random.Random) -> Schema:
    """An object at the top, as answers mostly are; now and then something else."""
    return _object(rng, 0) if rng.random() < 0.85 else _value(rng, 1)


def _value(rng: random.Random, depth: int) -> Schema:
    makers = [_string, _string, _integer, _number, _boolean, _choice, _constant, _nullable]
    if depth < 3:
        makers += [_array, _array, _object, _either]
    made = rng.choice(makers)(rng, depth)
    if rng.random() < 0.2:
        made = {"description": 'what { braces } and "quotes" say changes nothing', **made}
    return made


def _string(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", **rng.choice([
        {"maxLength": rng.randrange(1, 16)},
        {"minLength": 2, "maxLength": 10},
        {"pattern": rng.choice(["^[A-Z]{3}-[0-9]{2,4}$", "^(north|south)$", "^[a-z_]{1,8}$", r"^\d+(\.\d{2})?$", "^v[0-9]"]),
         "maxLength": 12},
        {"format": rng.choice(["date", "uuid", "ipv4", "email"]), "maxLength": 40},
    ])}  # fmt: skip


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-500, 500)
    return {"type": "integer", **rng.choice([
        {"minimum": low, "maximum": low + rng.randrange(0, 2000)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 2 + rng.randrange(0, 50)},
        {"minimum": 0, "maximum": 1000, "multipleOf": rng.choice([2, 5, 10])},
    ])}  # fmt: skip


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-20, 20)
    return {"type": "number", "minimum": low, "maximum": low + rng.choice([1, 10, 1000])}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _choice(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*WORDS, "größe", "a b", 'say "x"', 1, 2.5, False, None], rng.randrange(1, 6))}


def _constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 7, True, None, [1, "a"], {"k": 0}])}


def _nullable(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_integer(rng, depth), {"type": "null"}]}


def _either(rng: random.Random, depth: int) -> Schema:
    key = rng.choice(["anyOf", "oneOf"])
    return {key: rng.sample([_boolean(rng, depth), _integer(rng, depth), {"type": "string", "maxLength": 6}], 2)}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(0, 3)
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": least, "maxItems": least + rng.randrange(0, 3)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randrange(1, 5 - depth))
    made: Schema = {"type": "object", "properties": {name: _value(rng, depth + 1) for name in names}}
    made["required"] = [name for name in names if rng.random() < 0.8]
    if rng.random() < 0.9:
        made["additionalProperties"] = False
    return made
