"""JSON bodies to request types, with the leniency of Ollama's decoder: unknown fields and nulls are passed over."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ollamapy.env import parse_duration
from ollamapy.errors import BadRequest

MAX_DEPTH = 64
MAX_BIASED = 1024  # entries of logit_bias
_T = TypeVar("_T")
# Objects under these names are the user's own: a null in them is a value.
_VERBATIM = frozenset(["arguments", "tools", "format", "response_format", "json_schema", "model_info", "info"])
_VERBATIM |= {"guided_json", "structured_outputs"}


def decode(body: bytes | bytearray, type: type[_T]) -> _T:
    """Raises BadRequest for an empty body, malformed JSON, wrong types, and values nested deeper than MAX_DEPTH."""
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        document = msgspec.json.decode(body)
        check_depth(document)
        return msgspec.convert(without_nulls(document), type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"invalid request: {error}") from None
    except RecursionError:
        raise BadRequest(f"invalid request: nested deeper than {MAX_DEPTH}") from None


def check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise BadRequest(f"invalid request: nested deeper than {MAX_DEPTH}")


def without_nulls(document: Any) -> Any:
    """Objects without their null members, except in what is the user's own."""
    if isinstance(document, dict):
        return {
            key: value if key in _VERBATIM else without_nulls(value) for key, value in document.items() if value is not None
        }
    if isinstance(document, list) and document and isinstance(document[0], dict | list):
        return [without_nulls(item) for item in document]
    return document


def lifetime(keep_alive: object) -> float | None:
    """Seconds of a `keep_alive` (a number, or a Go duration), infinity for a negative one, None where it is absent."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool):
        return float("inf") if keep_alive < 0 else float(keep_alive)
    if isinstance(keep_alive, str):
        try:
            return parse_duration(keep_alive)
        except ValueError as error:
            raise BadRequest(str(error)) from None
    names = {bool: "bool", list: "array", dict: "object"}
    raise BadRequest(f"Unsupported type: '{names.get(type(keep_alive), 'unknown')}'")


def check_bias(bias: dict[str, float]) -> None:
    """OpenAI's logit_bias: token ids as text -> what is added to their logits. Raises BadRequest."""
    if len(bias) > MAX_BIASED:
        raise BadRequest(f"logit_bias has more than {MAX_BIASED} entries")
    for id, value in bias.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10 and -100.0 <= value <= 100.0):
            raise BadRequest("logit_bias must have token ids as keys and numbers between -100 and 100 as values")
