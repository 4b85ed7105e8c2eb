"""What holds an answer of /v1 to a form, in OpenAI's, vLLM's and llama.cpp's words, as Ollama's `format`. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from ollamapy.errors import BadRequest

_STRUCTURED = {"json": "", "regex": "regex", "choice": "choices", "grammar": "grammar"}  # ours for vLLM's


class Structured(msgspec.Struct, kw_only=True):
    """`response_format` is OpenAI's, `grammar` and `json_schema` are llama.cpp's, the rest vLLM's. Schemas are strict."""

    response_format: dict[str, Any] = {}
    grammar: str = ""
    json_schema: Any = None
    guided_json: Any = None
    guided_regex: str = ""
    guided_choice: list[str] = []
    guided_grammar: str = ""
    structured_outputs: dict[str, Any] = {}


def asked_format(request: Structured) -> Any:
    """None where nothing is asked. Raises BadRequest, also for two forms at once."""
    found: dict[str, Any] = {}
    if (kind := _response_format(request.response_format)) is not None:
        found["response_format"] = kind
    for name in ("json_schema", "guided_json"):
        if (schema := getattr(request, name)) not in (None, ""):
            found[name] = _schema(name, schema)
    for name, key in (("grammar", "grammar"), ("guided_grammar", "grammar"), ("guided_regex", "regex")):
        if value := getattr(request, name):
            found[name] = {key: value}
    if request.guided_choice:
        found["guided_choice"] = {"choices": request.guided_choice}
    for key, value in request.structured_outputs.items():
        if value is None:
            continue
        if key not in _STRUCTURED:
            raise BadRequest(f"structured_outputs: {key}: not supported (json, regex, choice and grammar are)")
        name = f"structured_outputs.{key}"
        found[name] = _schema(name, value) if key == "json" else {_STRUCTURED[key]: value}
    if len(found) > 1:
        raise BadRequest(f"{' and '.join(found)}: an answer can be held to only one of them")
    return next(iter(found.values()), None)


def _schema(name: str, given: Any) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(given) if isinstance(given, str) else given
    except msgspec.DecodeError as error:
        raise BadRequest(f"{name}: {error}") from None
    if not isinstance(schema, dict):
        raise BadRequest(f"{name}: a JSON Schema is an object")
    return schema


def _response_format(given: dict[str, Any]) -> Any:
    kind = given.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return given["schema"] if isinstance(given.get("schema"), dict) else "json"  # llama.cpp's way to send one
    if kind != "json_schema":
        raise BadRequest(f"invalid response_format type: {kind!r} (must be 'text', 'json_object' or 'json_schema')")
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise BadRequest("response_format: json_schema needs an object 'schema'")
    return schema
