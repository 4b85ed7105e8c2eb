"""Tools: a call that is asked for comes, in the model's syntax, with arguments that fit its schema. By the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ollama
import openai
import pytest

from tests.scripted import write_scripted
from tests.server.daemon import Daemon

HEAD = """{{- if .Tools }}<|im_start|>system
{{ .System }} Tools:
{{ range .Tools }}{{ . }}
{{ end }}%s<|im_end|>
{{ end }}"""
TAIL = "{{ end }}<|im_start|>assistant\n"
TURN = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
CALLS = '{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}'
TEMPLATES = {
    "hermes": HEAD % 'Call with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>' + TURN + CALLS + TAIL,
    "mistral": HEAD % "Call with [TOOL_CALLS] [...]" + TURN + CALLS + TAIL,
    "llama3": HEAD % 'Call with {"name": ..., "parameters": ...}. <|start_header_id|>' + TURN + CALLS + TAIL,
    "unknown": HEAD % "Call as you like" + TURN + CALLS + TAIL,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
MAIL = {
    "type": "object",
    "properties": {
        "to": {"type": "array", "items": {"$ref": "#/$defs/name"}, "minItems": 1, "maxItems": 2},
        "urgent": {"type": "boolean"},
    },
    "required": ["to", "urgent"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "pattern": "^[a-z]{2,8}$"}},
}
SCHEMAS = {"weather": WEATHER, "send_mail": MAIL}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
ASK: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def api(daemon: Daemon, client_of_module: ollama.Client) -> Iterator[openai.OpenAI]:
    for name, template in TEMPLATES.items():
        client_of_module.create(name, from_="smollm2", template=template)
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client_of_module(daemon: Daemon) -> Iterator[ollama.Client]:
    with ollama.Client(daemon.url) as made:
        yield made


def ask(api: openai.OpenAI, model: str, speculation: str = "auto", **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 160, "tools": TOOLS, "tool_choice": "required", **fields}
    extra = {"options": {"speculation": speculation}, **fields.pop("extra_body", {})}
    return api.chat.completions.create(model=model, messages=ASK, extra_body=extra, **fields).choices[0]


def check(choice: Any) -> list[str]:
    """Names of the calls, whose arguments fit."""
    assert choice.finish_reason == "tool_calls", choice
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id.startswith("call_")
        jsonschema.Draft202012Validator(SCHEMAS[call.function.name]).validate(json.loads(call.function.arguments))
    return [call.function.name for call in choice.message.tool_calls]


@pytest.mark.parametrize("model", ["hermes", "mistral", "llama3"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.3, "seed": 5}])
def test_a_call_that_is_required_comes(api: openai.OpenAI, model: str, fields: dict[str, Any]) -> None:
    choice = ask(api, model, parallel_tool_calls=False, **fields)
    assert len(check(choice)) == 1 and not choice.message.content
    same = ask(api, model, "off", parallel_tool_calls=False, **fields)
    assert [call.function for call in same.message.tool_calls] == [call.function for call in choice.message.tool_calls]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_function_that_is_named(api: openai.OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    for model in ("hermes", "mistral", "llama3"):
        made = ask(api, model, tool_choice=choice, parallel_tool_calls=False, temperature=1.0, seed=1)
        assert check(made) == [name]


def test_several_calls_fit_too(api: openai.OpenAI) -> None:
    counts = []
    for seed in range(2):
        made = ask(api, "hermes", temperature=1.5, seed=seed, max_tokens=400)
        if made.finish_reason == "tool_calls":
            counts.append(len(check(made)))
        else:
            assert made.finish_reason == "length"
    assert counts


@pytest.mark.parametrize("opened", [True, False])
def test_thinking_is_free_and_the_call_follows(
    daemon: Daemon, api: openai.OpenAI, client_of_module: ollama.Client, tmp_path: Path, opened: bool
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}<tool_call> " + ("<think>" if opened else "")
    template += "{# <think> </think> #}"
    pieces = [*([] if opened else ["<think>"]), "let", "▁<tool_call>", "▁see", "</think>", "<tool_call>"]
    path = write_scripted(tmp_path / "m.gguf", pieces, tokenizer__chat_template=template)
    client_of_module.create("thinker", files={"m.gguf": client_of_module.create_blob(path)})
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    made = ask(api, "thinker", tool_choice=choice, parallel_tool_calls=False, max_tokens=300)
    assert check(made) == ["weather"] and not made.message.content
    assert made.message.reasoning.strip() == "let <tool_call> see"
    client_of_module.generate("thinker", keep_alive=0)
    client_of_module.delete("thinker")


def test_a_stream_has_the_same_calls(api: openai.OpenAI) -> None:
    whole = ask(api, "hermes", parallel_tool_calls=False)
    chunks = list(
        api.chat.completions.create(
            model="hermes", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
            temperature=0, max_tokens=160, stream=True,
        )
    )  # fmt: skip
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert len(calls) == 1 and calls[0].function is not None and calls[0].index == 0
    assert calls[0].function.model_dump() == whole.message.tool_calls[0].function.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_auto_is_free_and_none_hides_tools(daemon: Daemon, api: openai.OpenAI) -> None:
    shown = ask(api, "hermes", tool_choice="auto", max_tokens=5)
    assert shown.finish_reason == "length" and not shown.message.tool_calls
    for choice, visible in (("auto", True), ("none", False), (None, True)):
        body = {"model": "hermes", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "_debug_render_only": True}
        text = daemon.post("/api/chat", {**body, "stream": False}).json()["_debug_info"]["rendered_template"]
        assert ("send_mail" in text) is visible


def test_natively(daemon: Daemon) -> None:
    body = {"model": "hermes", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    made = daemon.post("/api/chat", {**body, "stream": False, "options": {"temperature": 0, "num_predict": 160}}).json()
    (call,) = made["message"]["tool_calls"]
    jsonschema.validate(call["function"]["arguments"], SCHEMAS[call["function"]["name"]])
    assert made["done_reason"] == "stop" and made["message"]["content"] == ""


def tool(**function: Any) -> Any:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(("model", "fields", "text"), [
    ("hermes", {"tool_choice": "sometimes"}, "tool_choice must be none, auto, required, or name a function"),
    ("hermes", {"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice: there is no tool 'no'"),
    ("hermes", {"tools": []}, "tool_choice: there are no tools"),
    ("hermes", {"response_format": {"type": "json_object"}}, "cannot be held to a format besides"),
    ("hermes", tool(parameters={"type": "array"}), "tools: f: parameters must be a JSON Schema of an object"),
    ("hermes", tool(parameters={"properties": {"a": {"not": {}}}}), "tools: f: "),
    ("hermes", {"tools": TOOLS + TOOLS}, "tools: two have one name"),
    ("hermes", {"tools": [{"type": "web", "function": {}}]}, "tools: each must be a function with a name"),
    ("unknown", {}, "the way in which unknown writes calls is not supported"),
    ("smollm2", {}, "smollm2 does not support tools"),
])  # fmt: skip
def test_what_cannot_be_honoured(api: openai.OpenAI, model: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, model, **fields)
    assert text in caught.value.message


def strict(value: bool, **more: Any) -> Any:
    return [{"type": "function", "function": {**tool["function"], "strict": value, **more}} for tool in TOOLS]


@pytest.fixture
def caller(client_of_module: ollama.Client, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model that says "sure", then `request.param` in tokens, and what a grammar lets it; again and again."""
    pieces, template = request.param
    types = [2, 3, 3, *256 * [6], 1, *(4 if len(pieces) == 1 else 1 for _ in pieces), 1]
    path = write_scripted(tmp_path / "m.gguf", ["▁sure", *pieces, "▁what"], tokenizer__ggml__token_type=types)
    client_of_module.create("caller", files={"m.gguf": client_of_module.create_blob(path)}, template=TEMPLATES[template])
    yield "caller"
    client_of_module.generate("caller", keep_alive=0)
    client_of_module.delete("caller")


def say(api: openai.OpenAI, model: str, tools: Any, **fields: Any) -> tuple[str, list[Any]]:
    """Text and calls, whose arguments fit."""
    message = ask(api, model, tool_choice="auto", tools=tools, **{"max_tokens": 1000, **fields}).message
    for call in message.tool_calls or []:
        schema = SCHEMAS[call.function.name]
        jsonschema.Draft202012Validator(schema).validate(json.loads(call.function.arguments))
    return message.content or "", message.tool_calls or []


@pytest.mark.parametrize("caller", [(["<tool_call>"], "hermes"), (["[TOOL_CALLS]"], "mistral")], indirect=True)
def test_a_call_that_the_model_begins_fits(api: openai.OpenAI, caller: str) -> None:
    """Where its marker is a token: without being asked to, and nothing before the marker changes."""
    for speculation in ("off", "auto"):
        text, calls = say(api, caller, TOOLS, speculation=speculation, parallel_tool_calls=False)
        assert text.strip().startswith("sure") and len(calls) >= 2, "and again, when it is done with one"
    assert say(api, caller, TOOLS, max_tokens=1)[0].strip() == "sure"
    again, same = say(api, caller, strict(True), parallel_tool_calls=False)
    assert (again, [call.function for call in same]) == (text, [call.function for call in calls])


@pytest.mark.parametrize("caller", [(["<tool", "_call>"], "hermes")], indirect=True)
def test_a_marker_that_is_spelled_takes_a_strict_tool(api: openai.OpenAI, caller: str) -> None:
    free, none = say(api, caller, TOOLS)
    assert not none and "what" in free, "it may be text that only looks like a call"
    text, calls = say(api, caller, strict(True))
    assert text.strip().startswith("sure") and len(calls) >= 2
    assert say(api, caller, strict(False)) == (free, [])


@pytest.mark.parametrize("caller", [(["<tool_call>"], "hermes")], indirect=True)
def test_a_schema_that_cannot_be_kept_is_told(daemon: Daemon, api: openai.OpenAI, caller: str) -> None:
    bad = {"type": "object", "properties": {"a": {"not": {}}}}
    body = {"model": caller, "messages": ASK, "options": {"num_predict": 60, "temperature": 0}, "stream": False}
    made = daemon.post("/api/chat", {**body, "tools": strict(False, parameters=bad)})
    assert made.status_code == 200 and "weather: the arguments of its calls are not held" in made.headers["x-ollamapy-warning"]
    assert all(isinstance(call["function"]["arguments"], dict) for call in made.json()["message"].get("tool_calls", []))
    refused = daemon.post("/api/chat", {**body, "tools": strict(True, parameters=bad)})
    assert refused.status_code == 400 and "tools: weather: " in refused.json()["error"]


def test_a_real_models_call_fits_when_strict(daemon: Daemon, api: openai.OpenAI) -> None:
    """SmolLM2 has seen calls in this chat; free, it asks for 40 days, which the schema does not have."""
    shown: list[dict[str, str]] = []
    for city, days in (("Paris", 3), ("Oslo", 2), ("Paris", 5)):
        call = json.dumps({"name": "weather", "arguments": {"city": city, "days": days}})
        shown.append({"role": "user", "content": f"Weather in {city} for {days} days?"})
        shown.append({"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"})
    messages = [*shown, {"role": "user", "content": "Weather in Rome for 40 days?"}]
    body = {"model": "hermes", "messages": messages, "stream": False, "options": {"num_predict": 80, "temperature": 0}}
    found = []
    for value in (False, True):
        (call, *_) = daemon.post("/api/chat", {**body, "tools": strict(value)}).json()["message"]["tool_calls"]
        found.append(jsonschema.Draft202012Validator(SCHEMAS["weather"]).is_valid(call["function"]["arguments"]))
    assert found == [False, True]
