"""Structured output, by the official clients, from real models: what is asked for is what comes, or a clear refusal."""

from __future__ import annotations

import datetime
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import ollama
import openai
import psutil
import pytest

from tests.scripted import write_scripted
from tests.server.daemon import Daemon
from tests.server.schemas import HANDMADE, Schema, random_schema

MODEL = "smollm2"
FORMATS = jsonschema.FormatChecker(["uuid", "ipv4", "email"])
ASK = "Describe a shop in Lisbon. Answer in JSON."
USER = [{"role": "user", "content": ASK}]
GREEDY = {"temperature": 0, "num_predict": 90, "num_ctx": 1024}


@FORMATS.checks("date", ValueError)
def is_date(value: object) -> bool:
    """RFC 3339 has a year 0000, which is a leap year; Python's dates begin with 0001."""
    return not isinstance(value, str) or bool(datetime.date.fromisoformat(value.replace("0000-", "2000-", 1)))


def validate(text: str, schema: Schema) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


def at_once(make: Callable[[Any], Any], work: Sequence[Any], threads: int = 12) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, work))


@pytest.fixture(scope="module")
def api(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def finished(client: ollama.Client, schemas: Sequence[Schema], options: dict[str, Any]) -> int:
    """How many answers came to their end; each of those must be valid."""

    def ask(schema: Schema) -> bool:
        made = client.chat(MODEL, USER, format=schema, options=options)
        if made.done_reason == "stop":
            validate(made.message.content or "", schema)
        return made.done_reason == "stop"

    return sum(at_once(ask, schemas))


def test_schemas(client: ollama.Client) -> None:
    rng = random.Random(11)
    schemas = [*HANDMADE, *(random_schema(rng) for _ in range(38))]
    assert finished(client, schemas, GREEDY) >= 0.75 * len(schemas)


def test_schemas_through_openai(api: openai.OpenAI) -> None:
    rng = random.Random(12)
    schemas = [random_schema(rng) for _ in range(16)]

    def ask(schema: Schema) -> bool:
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        made = api.chat.completions.create(
            model=MODEL, messages=USER, response_format=form, temperature=0, max_tokens=90  # type: ignore[arg-type]
        )  # fmt: skip
        (choice,) = made.choices
        if choice.finish_reason == "stop":
            validate(choice.message.content or "", schema)
        return choice.finish_reason == "stop"

    assert sum(at_once(ask, schemas)) >= 0.75 * len(schemas)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_three_hundred_schemas(client: ollama.Client, temperature: float) -> None:
    rng = random.Random(13)
    schemas = [random_schema(rng) for _ in range(300)]
    assert finished(client, schemas, {**GREEDY, "temperature": temperature, "seed": 5, "num_predict": 250}) >= 0.85 * 300


def test_any_object(client: ollama.Client, api: openai.OpenAI) -> None:
    options = {"temperature": 0, "num_predict": 60, "stop": ["]"]}
    for seed in range(2):
        made = client.generate(MODEL, ASK, format="json", options={**options, "temperature": 1.0, "seed": seed, "stop": []})
        assert made.response.startswith("{")
        if made.done_reason == "stop":
            assert isinstance(json.loads(made.response), dict)
    cut = client.generate(MODEL, ASK, format="json", options=options)
    assert cut.response.startswith("{") and "]" not in cut.response
    two = client.generate(MODEL, ASK, format={"type": "integer"}, options={**GREEDY, "num_predict": 2})
    assert (two.done_reason, two.eval_count) == ("length", 2) and re.fullmatch(r"-?[0-9]+", two.response)
    text = api.chat.completions.create(
        model=MODEL, messages=USER, response_format={"type": "json_object"}, max_tokens=8, temperature=0  # type: ignore[arg-type]
    )  # fmt: skip
    assert (text.choices[0].message.content or "").startswith("{")
    free = api.chat.completions.create(
        model=MODEL, messages=USER, response_format={"type": "text"}, max_tokens=8, temperature=0  # type: ignore[arg-type]
    )  # fmt: skip
    assert not (free.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(("format", "pattern"), [
    ({"regex": r"[A-Z]{3}/[0-9]{2}\n(x|y)"}, r"[A-Z]{3}/[0-9]{2}\n(x|y)"),
    ({"regex": r"a\/b|c/d"}, "a/b|c/d"),
    ({"regex": "line\nbreak"}, "line\nbreak"),
    ({"regex": r"\\/\d"}, r"\\/\d"),
    ({"choices": ["yes", 'a "quoted" one', "new\nline", "größer"]}, '(yes|a "quoted" one|new\nline|größer)'),
    ({"lark": 'start: "<" word ("," word)* ">"\nword: /[a-z]{2,5}/'}, r"<[a-z]{2,5}(,[a-z]{2,5})*>"),
])  # fmt: skip
def test_other_grammars(client: ollama.Client, format: Any, pattern: str) -> None:
    for seed in range(3):
        options = {"temperature": 1.5, "top_k": 0, "seed": seed, "num_predict": 200}
        made = client.chat(MODEL, USER, format=format, options=options)
        assert made.done_reason == "stop" and re.fullmatch(pattern, made.message.content or ""), made


def test_streams(client: ollama.Client, api: openai.OpenAI) -> None:
    schema = HANDMADE[2]
    whole = client.chat(MODEL, USER, format=schema, options=GREEDY)
    parts = list(client.chat(MODEL, USER, format=schema, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content and len(parts) > 5
    assert parts[-1].done_reason == whole.done_reason == "stop" and parts[-1].eval_count == whole.eval_count
    validate(whole.message.content or "", schema)
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    with api.chat.completions.create(
        model=MODEL, messages=USER, response_format=form, temperature=0, max_tokens=90, stream=True  # type: ignore[arg-type]
    ) as stream:  # fmt: skip
        chunks = list(stream)
    validate("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), schema)


def test_logprobs_are_raw(client: ollama.Client) -> None:
    """Of the model as it is: what it would rather say than what it may is among the likeliest."""
    made = client.chat(MODEL, USER, format={"choices": ["zebra"]}, options=GREEDY, logprobs=True, top_logprobs=2)
    assert made.message.content == "zebra" and made.logprobs
    first = made.logprobs[0]
    assert first.token not in [other.token for other in first.top_logprobs or []] and first.logprob < -2


def test_beside_others(client: ollama.Client) -> None:
    """Free and held requests together say what each says alone; with sampling."""

    def ask(at: int) -> str:
        options = {"temperature": 0.9, "seed": at, "num_predict": 16}
        made = client.chat(MODEL, USER, format=HANDMADE[at % 5] if at % 2 else None, options=options)
        return f"{made.done_reason} {made.message.content}"

    alone = [ask(at) for at in range(8)]
    assert at_once(ask, range(8)) == alone


def deep(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(("format", "text"), [
    ({"type": "objekt"}, "Invalid type: objekt"),
    ({"type": 5}, "type must be a string"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"$ref": "#"}, "no text fits it"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text fits it"),
    ({"$ref": "#/$defs/missing"}, "does not exist"),
    ({"$ref": "http://example.com/schema.json"}, "http://example.com/schema.json"),
    ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
    ({"type": "string", "format": "colour"}, "Unknown format: colour"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(" * 500}, "unclosed group"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
    ({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(10)]} for i in range(10)]}, "schema too large"),
    ({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}, "type": "object"}, "items"),
    ({"enum": [f"v{i}" for i in range(100_000)]}, "bytes of JSON, which is more than 65536"),
    (json.loads(deep(33)), "nested deeper than 32"),
    ({"regex": "(("}, "unclosed group"),
    ({"regex": ""}, '"regex" must be a str that is not empty'),
    ({"regex": "(.{1,500}){1,500}x"}, "too many expressions"),
    ({"lark": "start: <|im_end|>"}, "unknown special token"),
    ({"lark": "start: missing"}, "missing"),
    ({"lark": 'start: s\ns: s s | "a" | /[a-z]/'}, ""),
    ({"choices": []}, '"choices" must be a list that is not empty'),
    ({"choices": ["a", 5]}, '"choices" must be strings'),
    (["object"], 'expected "json" or a valid JSON Schema object'),
    ("yaml", 'expected "json" or a valid JSON Schema object'),
    (True, 'expected "json" or a valid JSON Schema object'),
])  # fmt: skip
def test_what_cannot_be_held_is_refused(daemon: Daemon, format: Any, text: str) -> None:
    pid = daemon.engine()["pid"]
    start = time.monotonic()
    made = daemon.post("/api/chat", {"model": MODEL, "messages": USER, "format": format, "stream": False, "options": GREEDY})
    assert time.monotonic() - start < 2
    assert made.status_code == 400 and text in made.json()["error"], made.text
    assert made.json()["error"].startswith(("invalid format: ", "the grammar cannot go on: ")) and len(made.text) < 1000
    assert daemon.engine()["pid"] == pid


def test_patterns_that_explode_elsewhere_are_served(client: ollama.Client) -> None:
    start = time.monotonic()
    for pattern in ("(a+)+b", "(.*a){25}", "^(([a-z]+.)+[A-Z]([a-z])+)+$", "(x+x+)+y"):
        made = client.chat(MODEL, USER, format={"type": "string", "pattern": pattern}, options={**GREEDY, "num_predict": 16})
        assert made.message.content is not None and made.message.content.startswith('"')
    for regex in ("[ab]*a[ab]{30}", "a{1000000000}", ".*"):
        assert client.chat(MODEL, USER, format={"regex": regex}, options={**GREEDY, "num_predict": 8}).done
    assert time.monotonic() - start < 10


def test_raw_depth(daemon: Daemon) -> None:
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "x"}}], "format": {deep(10_000)}}}'
    made = httpx.post(daemon.url + "/api/chat", content=body, timeout=10, trust_env=False)
    assert made.status_code == 400 and "nested deeper" in made.text


def test_a_failing_check_is_survived(daemon: Daemon, client: ollama.Client) -> None:
    """The process that checks formats is killed: the next question starts another."""

    def checkers() -> list[psutil.Process]:
        children = psutil.Process(daemon.process.pid).children()
        return [child for child in children if "grammar_check" in " ".join(child.cmdline())]

    client.chat(MODEL, USER, format={"const": 1}, options=GREEDY)
    (before,) = checkers()
    before.kill()
    before.wait(5)
    made = [
        daemon.post("/api/generate", {"model": MODEL, "prompt": "x", "format": {"const": at}, "stream": False}) for at in (2, 3)
    ]
    assert [each.json().get("response") for each in made] == ["2", "3"], made[0].text
    (after,) = checkers()
    assert after.pid != before.pid


@pytest.mark.parametrize(("fields", "text"), [
    ({"type": "json_schema"}, "json_schema needs an object 'schema'"),
    ({"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}, "invalid format: Invalid type: objekt"),
    ({"type": "grammar"}, "invalid response_format type: 'grammar'"),
])  # fmt: skip
def test_openai_refusals(api: openai.OpenAI, fields: Any, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        api.chat.completions.create(model=MODEL, messages=USER, response_format=fields)  # type: ignore[arg-type]
    assert text in error.value.message and error.value.type == "invalid_request_error"


# --- thinking -------------------------------------------------------------------------------------------------

OPENED = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}{# </think> #}"
UNOPENED = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think></think> #}"
THOUGHTS = ["\u2581let", "\u2581me", "\u2581{", "\u2581see", "</think>", "\u2581good", "\u2581bye"]


@pytest.fixture(scope="module")
def thinkers(bare_daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """`opened`'s prompt ends inside the thinking; `unopened` opens it by itself; `straight` answers without a thought."""
    folder = tmp_path_factory.mktemp("thinkers")
    models = {
        "opened": (OPENED, THOUGHTS),
        "unopened": (UNOPENED, ["<think>", *THOUGHTS]),
        "straight": (UNOPENED, ["good"]),
    }
    with ollama.Client(bare_daemon.url) as client:
        for name, (template, pieces) in models.items():
            path = write_scripted(folder / f"{name}.gguf", pieces, tokenizer__chat_template=template)
            client.create(name, files={"m.gguf": client.create_blob(path)})
        yield bare_daemon
        for name in models:
            client.generate(name, keep_alive=0)
            client.delete(name)


@pytest.mark.parametrize("name", ["opened", "unopened"])
@pytest.mark.parametrize("format", [{"choices": ["good", "bad"]}, {"enum": ["good", 5]}, {"const": {"a": 1}}])
def test_thinking_is_free_and_the_answer_held(thinkers: Daemon, name: str, format: dict[str, Any]) -> None:
    with ollama.Client(thinkers.url) as client:
        made = client.chat(name, USER, format=format, think=True, options={"temperature": 0, "num_predict": 200})
    assert made.message.thinking is not None and made.message.thinking.strip() == "let me { see", made
    assert made.done_reason == "stop"
    content = made.message.content or ""
    if "choices" in format:
        assert content == "good"
    else:
        validate(content, format)


def test_without_thinking(thinkers: Daemon) -> None:
    with ollama.Client(thinkers.url) as client:
        for name, think in (("straight", True), ("straight", None), ("opened", False)):
            made = client.chat(name, USER, format={"choices": ["good"]}, think=think, options={"temperature": 0})
            assert (made.message.content, made.message.thinking or "") == ("good", ""), (name, think, made)
