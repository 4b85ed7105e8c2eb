"""Finding tool calls in answers: every cut of the text gives the same events, and nothing is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ollamapy.chat.interface import CallStyle, Parser, PlainParser
from ollamapy.chat.thinking import DEFAULT_TAGS, ThinkingParser
from ollamapy.chat.toolcalls import HERMES, LLAMA3, MISTRAL, ToolParser, style_of

Found = tuple[str, str, list[tuple[str, dict[str, Any]]]]


def parsed(style: CallStyle, pieces: list[str], inner: Parser) -> Found:
    parser = ToolParser(inner, style, {"f", "g"})
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.feed("", done=True)
    calls = [call for event in events for call in event.tool_calls]
    assert [call.function.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    content, thinking = "".join(event.content for event in events), "".join(event.thinking for event in events)
    return content, thinking, [(call.function.name, call.function.arguments) for call in calls]


F, G = '{"name": "f", "arguments": {"x": [1, {"y": "}]</tool_call>"}]}}', '{"name": "g", "arguments": {}}'
FX, GX = ("f", {"x": [1, {"y": "}]</tool_call>"}]}), ("g", {})


@pytest.mark.parametrize(("style", "text", "expected"), [
    (HERMES, f"<tool_call>\n{F}\n</tool_call>", ("", "", [FX])),
    (HERMES, f"\n\n<tool_call>{F}</tool_call>\n<tool_call>\n{G}\n</tool_call>\n", ("", "", [FX, GX])),
    (HERMES, f"Sure: <tool_call>{G}</tool_call> Done.", ("Sure: Done.", "", [GX])),
    (HERMES, f"{G}", ("", "", [GX])),
    (HERMES, f"<tool_call>{G}", ("", "", [GX])),
    (HERMES, f"<think>I <tool_call> it</think>\n\n<tool_call>{G}</tool_call>", ("", "I <tool_call> it", [GX])),
    (HERMES, 'a < b <tool_call>{"name": "other", "arguments": {}}</tool_call> c',
     ('a < b <tool_call>{"name": "other", "arguments": {}}</tool_call> c', "", [])),
    (HERMES, '<tool_call>{"name": "f", "argum', ('<tool_call>{"name": "f", "argum', "", [])),
    (HERMES, '{"answer": [1, 2]} and more', ('{"answer": [1, 2]} and more', "", [])),
    (HERMES, '{"name": "f", "arguments": "x"}', ('{"name": "f", "arguments": "x"}', "", [])),
    (HERMES, '{"name": ["f"], "arguments": {}}', ('{"name": ["f"], "arguments": {}}', "", [])),
    (HERMES, "<tool_cal", ("<tool_cal", "", [])),
    (HERMES, "  { no JSON", ("  { no JSON", "", [])),
    (HERMES, " \n", (" \n", "", [])),
    (MISTRAL, f"[TOOL_CALLS] [{F}, {G}]", ("", "", [FX, GX])),
    (MISTRAL, f"[{G}]", ("", "", [GX])),
    (MISTRAL, "[1] says so", ("[1] says so", "", [])),
    (LLAMA3, F.replace("arguments", "parameters"), ("", "", [FX])),
    (LLAMA3, f"{G}; {F}", ("", "", [GX, FX])),
    (LLAMA3, f"Not at the start: {G}", (f"Not at the start: {G}", "", [])),
])  # fmt: skip
def test_calls_are_found(style: CallStyle, text: str, expected: Found) -> None:
    rng = random.Random(1)
    for cuts in ([text], list(text), *(cut(text, rng) for _ in range(20))):
        inner = ThinkingParser(DEFAULT_TAGS) if "<think>" in text else PlainParser()
        assert parsed(style, cuts, inner) == expected


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("style", [HERMES, MISTRAL, LLAMA3])
def test_any_pieces_give_the_same_events(style: CallStyle) -> None:
    rng = random.Random(2)
    words = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", F, G, "[", "]", "{", "}", '"', " ", "\n", "text", ",", "<", ";"]
    for _ in range(1500):
        text = "".join(rng.choice(words) for _ in range(rng.randrange(1, 9)))
        assert parsed(style, list(text), PlainParser()) == parsed(style, [text], PlainParser()), text


def test_styles_are_told_from_templates() -> None:
    assert style_of('... <tool_call>\n{"name": ...}') is HERMES and style_of("[AVAILABLE_TOOLS] [TOOL_CALLS] [") is MISTRAL
    assert style_of('<|start_header_id|> {"name": n, "parameters": p}') is LLAMA3
    for other in ("<tool_call><function=f>", "<tool_call>f<arg_key>", "[TOOL_CALLS]f[ARGS]{}", "{{ .Prompt }}"):
        assert style_of(other) is None
