"""The Go template interpreter against real Go: outputs and errors recorded from Go 1.27, and the limits of a run."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamapy.api.messages import Message, Tool, ToolCall, ToolCallFunction
from ollamapy.chat.godata import message_value, tools_value
from ollamapy.chat.gotemplate import Template
from ollamapy.errors import TemplateError
from tests.conftest import DATA

GO = json.loads((DATA / "go_text_template.json").read_text())


def _chat_data() -> dict[str, Any]:
    messages = []
    for message in GO["messages"]:
        calls = [
            ToolCall(
                ToolCallFunction(call["Function"]["Name"], call["Function"]["Arguments"], call["Function"].get("Index")),
                id=call.get("ID", ""),
            )
            for call in message.get("ToolCalls", [])
        ]
        messages.append(
            Message(
                role=message["Role"],
                content=message["Content"],
                thinking=message.get("Thinking", ""),
                tool_calls=calls or None,
                tool_name=message.get("ToolName", ""),
                tool_call_id=message.get("ToolCallID", ""),
            )
        )
    tools = [msgspec.convert(tool, Tool) for tool in GO["tools"]]
    values = [message_value(message, message.content or "") for message in messages]
    return {"Response": "", "Messages": values, "Tools": tools_value(tools)}


CHAT = _chat_data()


@pytest.mark.parametrize("case", GO["cases"], ids=lambda case: case["template"][:40])
def test_as_go(case: dict[str, Any]) -> None:
    data = CHAT if case["data"] == "chat" else GO["values"]
    if "error" in case:
        with pytest.raises(TemplateError, match=r"^template: :\d+: "):
            Template.parse(case["template"]).execute(data)
        return
    today = datetime.date.today()
    made = Template.parse(case["template"]).execute(data)
    made = made.replace(today.isoformat(), "D").replace((today - datetime.timedelta(1)).isoformat(), "Y")
    assert made == case["out"]


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("a\n{{ foo }}", 2, 'function "foo" not defined'),
        ("{{ if .x }}\n\n", 3, "unexpected EOF"),
        ("\n\n{{ .x", 3, "unclosed action"),
        ("{{- /* a\nb */ -}}\n\n{{ $x }}", 4, 'undefined variable "$x"'),
        ("x\n{{ index .l 7 }}", 2, "index out of range: 7"),
        ('{{ "a\n" }}', 1, "unterminated quoted string"),
        ("{{ end }}", 1, "unexpected {{end}}"),
    ],
)
def test_errors_name_the_line(source: str, line: int, text: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse(source).execute({"l": [1]})
    assert str(caught.value).startswith(f"template: :{line}: ")
    assert text in str(caught.value)
    assert caught.value.status == 400


def test_variables_are_found_in_every_scope() -> None:
    source = (
        "{{ range .Messages }}{{ with .A.B }}{{ if and .C (not .D) }}{{ $x := .E }}{{ $x.F }}{{ end }}{{ end }}{{ else }}"
        '{{ .G }}{{ end }}{{ define "t" }}{{ (index .H 0).I }}{{ end }}{{ template "t" $.J }}{{ .K | printf "%s" }}'
    )
    assert Template.parse(source).variables() == {f".{name}" for name in ["Messages", *"ABCDEFGHIJK"]}


def test_a_tree_is_reusable_and_keeps_no_state() -> None:
    template = Template.parse("{{ $x := .a }}{{ range .l }}{{ $x = . }}{{ end }}{{ $x }}{{ .a }}")
    assert [template.execute({"a": a, "l": items}) for a, items in (("1", ["2"]), ("3", []), ("1", ["2"]))] == [
        "21",
        "33",
        "21",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "{{ range 1000000000 }}{{ end }}",
        "{{ range 1000 }}{{ range 1000 }}{{ range 1000 }}{{ end }}{{ end }}{{ end }}",
        "{{ range 100000 }}{{ $.big }}{{ end }}",
        "{{ range 100000 }}0123456789012345678901234567890123456789012345678901234567890123456789{{ end }}",
        '{{ $s := "aaaa" }}{{ range 60 }}{{ $s = printf "%s%s" $s $s }}{{ end }}',
        '{{ $s := "aaaa" }}{{ range 60 }}{{ $s = print $s $s }}{{ end }}',
        '{{ $s := "<<<<" }}{{ range 60 }}{{ $s = html $s $s }}{{ end }}',
        '{{ $s := "<<<<" }}{{ range 60 }}{{ $s = json $s }}{{ end }}',
        '{{ $s := "aaaa" }}{{ range 60 }}{{ $s = urlquery (js $s $s) }}{{ end }}',
        '{{ range 1000000 }}{{ $x := printf "%999999d" 1 }}{{ end }}',
        '{{ range 1000000 }}{{ $x := printf "%.999999f" 1.5 }}{{ end }}',
        '{{ range 1000000 }}{{ $x := printf "%*d" 999999 1 }}{{ end }}',
        '{{ define "t" }}{{ template "t" . }}{{ end }}{{ template "t" . }}',
        '{{ define "t" }}{{ template "t" . }}{{ template "t" . }}{{ end }}{{ template "t" . }}',
        "{{ range 1000000 }}{{ $x := json $.tree }}{{ end }}",
        "{{ range 1000000 }}{{ $x := len $.wide }}{{ end }}",
        "{{ range 1000000 }}{{ $x := slice $.big 1 }}{{ end }}",
        "{{ range 1000000 }}{{ $x := eq $.big $.other }}{{ end }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ if 1 }}" * 3000 + "{{ end }}" * 3000,
        "x" * (1 << 20),
        "{{ .a" + ".b" * 100_000 + " }}",
    ],
    ids=lambda source: source[:60],
)
def test_limits_hold(source: str) -> None:
    tree: dict[str, Any] = {"leaf": "x"}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    data = {"big": "x" * 3_000_000, "other": "x" * 2_999_999 + "y", "wide": "é" * 1_000_000, "tree": tree}
    started = time.monotonic()
    with pytest.raises(TemplateError):
        Template.parse(source).execute(data)
    assert time.monotonic() - started < 4  # 1 s by the clock, and what one large step may take on a busy machine


def test_values_that_are_no_utf8_come_out_replaced() -> None:
    made = Template.parse('{{ slice "日本" 1 }}{{ "\\xff" }}').execute({})
    made.encode()
    assert made.endswith("本\ufffd")
    assert "\ufffd" in made[:-2]


def test_long_else_if_chains_do_not_nest() -> None:
    arms = "".join(f"{{{{ else if eq .n {number} }}}}{number}" for number in range(1, 300))
    template = Template.parse(f"{{{{ if eq .n 0 }}}}0{arms}{{{{ else }}}}none{{{{ end }}}}")
    assert [template.execute({"n": number}) for number in (0, 299, 300)] == ["0", "299", "none"]


PIECES = "{{ }} {{- -}} if else end range with define block template break nil . .a .b.c $ $x := = , | ( ) 1 -2.5 'c' \"s\" `r`"
FUNCTIONS = "and or not eq lt len index slice print printf html js urlquery json call toTypeScriptType {{/* */}} \\ \n é"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from((PIECES + " " + FUNCTIONS).split(" ")), max_size=25), st.sampled_from(["", " "]))
def test_any_text_renders_or_is_a_template_error(pieces: list[str], between: str) -> None:
    try:
        Template.parse(between.join(pieces)).execute({"a": "x", "b": {"c": [1.0, None]}}).encode()
    except TemplateError as error:
        assert str(error)
