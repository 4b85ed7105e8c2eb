"""Jinja chat templates rendered as transformers renders them: same texts, same refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ollamapy.api.messages import Message, Tool, ToolCall, ToolCallFunction
from ollamapy.chat import jinja
from ollamapy.chat.interface import SpecialTokens
from ollamapy.chat.jinjaformat import JinjaFormat
from ollamapy.errors import TemplateError
from ollamapy.gguf.reader import GGUFFile
from tests.conftest import DATA

KNOWN = [template for line in (DATA / "known_jinja.jsonl").read_text().splitlines() for template in json.loads(line).values()]
SPECIAL = SpecialTokens("<s>", "</s>")
CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "user": [("user", "Hello, how are you?")],
    "empty": [("user", "")],
    "system": [("system", "Be brief."), ("user", "Hi")],
    "turns": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "unicode": [("system", "s"), ("user", " a \n"), ("assistant", "b\n"), ("user", "日本語 🎉 é \u2028 <b> & 'q' \"z\"")],
    "twice": [("user", "a"), ("user", "b")],
    "only system": [("system", "s")],
    "continued": [("system", "s"), ("user", "a"), ("assistant", "The answer is ")],
    "continued trimmed": [("user", "a"), ("assistant", "\n The answer\n\n")],
}
RICH = """{%- macro show(tool, depth=0) -%}
    {{- '  ' * depth }}{{ tool.function.name | upper }}
    ({{ tool.function.parameters.properties | items | map('first') | join(', ') }})
{%- endmacro -%}
{%- set ns = namespace(last=-1, calls=[]) -%}
{%- for message in messages if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}
{{ bos_token }}{% if tools %}<tools>
{% for tool in tools %}{{ show(tool, loop.index) }}
{{ tool | tojson }}
{{ tool.function.parameters | tojson(indent=2) }}
{% endfor %}</tools>{% endif %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% if message.reasoning_content is defined and loop.index0 > ns.last %}<think>
{{ message.reasoning_content.strip('\\n') }}
</think>{% endif %}
        {% generation %}{% set inner = message.content %}{{ inner | trim }}{% endgeneration %}
        {% for call in message.tool_calls or [] %}<call id="{{ call.id | default('none') }}">
{{ call.function.name ~ ' ' ~ call.function.arguments | tojson }}{% if not loop.last %},{% endif %}</call>{% endfor %}
    {% elif message.role == 'tool' %}<result {{ message.name }} {{ message.tool_call_id }}>{{ message.content }}</result>
    {% elif message.role == 'skip' %}{% continue %}
    {% else %}[{{ message['role'].title() }}]
        {{- message.content.split('|')[-1].replace('x', 'yy', 1) }}{{ '%s-%05.2f' % ('a', 2.5) }}
    {% endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think>

</think>{% endif %}{{ reasoning_effort | default('') }}{% endif %}"""
TOOLS = [
    Tool(
        function={
            "name": "get_weather",
            "description": "Tells é <b> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2.5, None]}}},
        }
    ),
    Tool(function={"name": "none", "parameters": {"type": "object", "properties": {}}}),
]
ROUND = [
    Message("system", "s"),
    Message("user", "weather|in x x?"),
    Message(
        "assistant",
        "",
        thinking="\nhm\n",
        tool_calls=[
            ToolCall(ToolCallFunction("get_weather", {"city": "Zürich <3", "days": 1}), id="c1"),
            ToolCall(ToolCallFunction("none", {})),
        ],
    ),
    Message("tool", "22°", tool_name="get_weather", tool_call_id="c1"),
]


def _as_dict(message: Message) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        shown["reasoning_content"] = message.thinking
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                **({"id": c.id} if c.id else {}),
                "type": "function",
                "function": {"name": c.function.name, "arguments": c.function.arguments},
            }
            for c in message.tool_calls
        ]
    if message.tool_name:
        shown |= {"name": message.tool_name, "tool_call_id": message.tool_call_id}
    return shown


def _transformers(template: str, messages: Sequence[Message], tools: Sequence[Tool] = (), **kwargs: Any) -> str | tuple[str]:
    """What transformers makes of it; in a tuple, the template's own error."""
    continued = messages[-1].role == "assistant" and not messages[-1].tool_calls
    try:
        rendered = render_jinja_template(
            [[_as_dict(message) for message in messages]],
            tools=[{"type": "function", "function": tool.function} for tool in tools] or None,
            chat_template=template,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            bos_token="<s>",
            eos_token="</s>",
            **kwargs,
        )[0]
    except jinja2.TemplateError as error:
        return (str(error.message),)
    text: str = rendered[0]
    return text


def _ours(template: str, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Any = None) -> str | tuple[str]:
    try:
        return JinjaFormat(template, SPECIAL).render(messages, tools=tools, think=think)
    except TemplateError as error:
        assert error.status == 400
        return (str(error),)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("index", range(len(KNOWN)))
def test_known_templates_as_transformers(index: int, conversation: str) -> None:
    messages = [Message(role, content) for role, content in CONVERSATIONS[conversation]]
    assert _ours(KNOWN[index], messages) == _transformers(KNOWN[index], messages)


def test_the_refusals_compared_are_really_there() -> None:
    refused = [
        _ours(template, [Message(role, content) for role, content in turns])
        for template in KNOWN
        for turns in CONVERSATIONS.values()
    ]
    texts = {result[0] for result in refused if isinstance(result, tuple)}
    assert "Conversation roles must alternate user/assistant/user/assistant/..." in texts
    assert "System role not supported" in texts
    assert len(texts) == 3


def test_real_models(smollm2_path: Path, gemma3_path: Path) -> None:
    with GGUFFile.open(gemma3_path) as gemma3:
        assert "tokenizer.chat_template" not in gemma3.metadata  # a base model
    with GGUFFile.open(smollm2_path) as smollm2:
        template = str(smollm2.metadata["tokenizer.chat_template"])
    assert JinjaFormat(template, SPECIAL).stops == ("<|im_end|>",)
    for turns in CONVERSATIONS.values():
        messages = [Message(role, content) for role, content in turns]
        made = _ours(template, messages)
        assert isinstance(made, str)
        assert made == _transformers(template, messages)


@pytest.mark.parametrize(
    ("messages", "tools", "think"),
    [
        (ROUND, TOOLS, None),
        (ROUND, TOOLS, True),
        (ROUND[:2], TOOLS, False),
        (ROUND[:2], (), None),
        ([*ROUND, Message("assistant", " It is ", thinking="t")], TOOLS, None),
        ([Message("user", "a"), Message("skip", "never"), Message("user", "b")], (), None),
    ],
)
def test_a_rich_template_as_transformers(messages: list[Message], tools: Sequence[Tool], think: bool | None) -> None:
    kwargs = {} if think is None else {"enable_thinking": think}
    made = _ours(RICH, messages, tools, think)
    assert isinstance(made, str)
    assert made == _transformers(RICH, messages, tools, **kwargs)
    if tools:
        assert '{"type": "function", "function": {"name": "get_weather", "description": "Tells é <b> & more"' in made


def test_levels_reach_the_template() -> None:
    template = "{{ enable_thinking }} {{ reasoning_effort | default('-') }}"
    rendered = [JinjaFormat(template, SPECIAL).render([Message("user", "")], think=think) for think in (True, False, "low")]
    assert rendered == ["True -", "False -", "True low"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('Sag ä: \"no\"') }}", 'Sag ä: "no"'),
        ("{{ messages[9].content.x }}", "list object has no element 9"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_errors_while_rendering(source: str, text: str) -> None:
    with pytest.raises(TemplateError, match=text) as caught:
        jinja.render(source, {"messages": []})
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x | nofilter }}", "{% for x in y %}", "a\n{{ (1 }}", "{{ 1" + "0" * 5000 + " }}"]
)
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        JinjaFormat(source, SPECIAL)


def test_undefined_tokens_are_undefined() -> None:
    template = "{{ 'none' if bos_token is not defined else bos_token }}"
    assert JinjaFormat(template, SpecialTokens()).render([Message("user", "")]) == "none"


def test_the_date() -> None:
    assert jinja.render("{{ strftime_now('%Y-%m-%d') }}", {}) == time.strftime("%Y-%m-%d")


def test_twenty_messages_render_in_two_milliseconds() -> None:
    messages = [Message("system", "Be kind.")]
    messages += [Message(("user", "assistant")[turn % 2], "word " * 60) for turn in range(19)]
    for template in (KNOWN[5], RICH):
        chat_format = JinjaFormat(template, SPECIAL)
        best = float("inf")
        for _ in range(20):
            started = time.perf_counter()
            chat_format.render(messages, tools=TOOLS if template is RICH else ())
            best = min(best, time.perf_counter() - started)
        assert best < 2e-3
