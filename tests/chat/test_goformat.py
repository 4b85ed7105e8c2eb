"""Go chat formats: the 60 golden renderings, the modes of Ollama's template package, images, think, speed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from ollamapy.api.messages import Message, Tool
from ollamapy.chat.goformat import GoFormat
from ollamapy.errors import TemplateError
from tests.conftest import DATA

GOLDEN = json.loads((DATA / "go_templates.json").read_text())
MODES = json.loads((DATA / "go_modes.json").read_text())["cases"]
TRAILING_SPACE_CUT = {"chatqa", "llama2-chat", "mistral-instruct", "openchat", "vicuna"}  # in the golden file


def _messages(turns: list[Any]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


@pytest.mark.parametrize("name", GOLDEN["templates"])
@pytest.mark.parametrize("conversation", GOLDEN["conversations"])
def test_golden_renderings(name: str, conversation: str) -> None:
    case = GOLDEN["templates"][name]
    made = GoFormat(case["template"]).render(_messages(GOLDEN["conversations"][conversation]))
    if name in TRAILING_SPACE_CUT:
        made = made.removesuffix(" ")
    assert made == case["rendered"][conversation]


@pytest.mark.parametrize("index", range(len(MODES)))
def test_modes_as_ollama(index: int) -> None:
    """Legacy turns, collation, the open last turn, suffix and think values."""
    case = MODES[index]
    chat_format = GoFormat(case["template"])
    think = bool(case["think"]) if case.get("isthinkset") else None
    if case.get("suffix"):
        made = chat_format.render_completion(case["prompt"], suffix=case["suffix"])
    else:
        made = chat_format.render(_messages([(m["Role"], m["Content"]) for m in case["messages"]]), think=think)
    assert made == case["out"]


def test_images_are_marked_across_the_whole_prompt() -> None:
    chat_format = GoFormat("{{ range .Messages }}{{ .Content }}|{{ len .Images }};{{ end }}")
    messages = [
        Message("user", "see [img] and", images=["AA==", "AA=="]),
        Message("assistant", "yes"),
        Message("user", "[img][img][img]", images=["AA==", "AA=="]),
    ]
    assert chat_format.render(messages) == "[img-1]see [img-0] and|2;yes|0;[img-2][img-3][img]|2;"


def test_think_levels() -> None:
    chat_format = GoFormat("{{ .Think }},{{ .ThinkLevel }},{{ .IsThinkSet }}{{ .Prompt }}")
    rendered = [chat_format.render_completion("", think=think) for think in (None, False, True, "high")]
    assert rendered == ["false,,false", "false,,true", "true,medium,true", "true,high,true"]


def test_tools_and_null_content() -> None:
    chat_format = GoFormat("{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}[{{ .Content }}]{{ end }}")
    tool = Tool(function={"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}})
    made = chat_format.render([Message("assistant", None)], tools=[tool])
    assert made == (
        '[{"type":"function","function":{"name":"f","description":"",'
        '"parameters":{"type":"","properties":{"x":{"type":"string"}}}}}][]'
    )
    assert chat_format.render([Message("user", "a")]) == "[a]"


def test_capabilities_and_errors() -> None:
    assert GoFormat("{{ .Prompt }}{{ .Suffix }}").capabilities == {"insert"}
    assert GoFormat("{{ range .Messages }}{{ end }}{{ if .Tools }}{{ end }}").capabilities == {"tools"}
    with pytest.raises(TemplateError, match=r"template: :1: "):
        GoFormat("{{ .Prompt")


def test_twenty_messages_render_in_three_milliseconds() -> None:
    messages = [Message("system", "Be kind.")]
    messages += [Message(("user", "assistant")[turn % 2], "word " * 60) for turn in range(19)]
    for name in ("command-r", "gemma3-instruct", "llama2-chat"):
        chat_format = GoFormat(GOLDEN["templates"][name]["template"])
        best = float("inf")
        for _ in range(20):
            started = time.perf_counter()
            chat_format.render(messages)
            best = min(best, time.perf_counter() - started)
        assert best < 3e-3
