"""Thinking told from content, whole, in pieces and cut short; and tags found in Go templates."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ollamapy.chat.goformat import GoFormat
from ollamapy.chat.gotemplate import Template
from ollamapy.chat.interface import ChatEvent, SpecialTokens
from ollamapy.chat.jinjaformat import JinjaFormat
from ollamapy.chat.thinking import DEFAULT_TAGS, ThinkingParser, infer_tags

CASES = [
    ("<think>deep\nthought</think>answer", "", "deep\nthought", "answer"),
    ("  \n<think>\n\n deep </think>\n\n answer ", "", "deep ", "answer "),
    ("answer without", "", "", "answer without"),
    ("  answer <think>not thinking</think>", "", "", "  answer <think>not thinking</think>"),
    ("<thin air", "", "", "<thin air"),
    (" <think", "", "", " <think"),
    ("", "", "", ""),
    ("   ", "", "", "   "),
    ("<think></think>x", "", "", "x"),
    ("<think>\n\n</think>\n\nx", "", "", "x"),
    ("<think>never closed </thi", "", "never closed </thi", ""),
    ("<think>a</think>b</think>c<think>d</think>", "", "a", "b</think>c<think>d</think>"),
    ("<think>a </th </think>b", "", "a </th ", "b"),
    ("<think>é日本🎉</think>日", "", "é日本🎉", "日"),
    ("\nhm</think>\nyes", "<a>\n<think>\n", "hm", "yes"),
    ("hm</think>yes", "<think>", "hm", "yes"),
    ("yes", "<think>\n\n</think>\n\n", "", "yes"),
    ("<think><think>a</think>b", "", "<think>a", "b"),
]


def _joined(events: Iterable[ChatEvent]) -> tuple[str, str]:
    events = list(events)
    return "".join(event.thinking for event in events), "".join(event.content for event in events)


def _fed(pieces: list[str], prompt: str) -> tuple[str, str]:
    parser = ThinkingParser(DEFAULT_TAGS, prompt)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.feed("", done=True)
    assert all(event.thinking or event.content for event in events)
    return _joined(events)


@pytest.mark.parametrize(("text", "prompt", "thinking", "content"), CASES)
def test_whole_split_and_by_character(text: str, prompt: str, thinking: str, content: str) -> None:
    assert _joined(ThinkingParser(DEFAULT_TAGS, prompt).feed(text, done=True)) == (thinking, content)
    assert _fed([*text], prompt) == (thinking, content)
    for cut in range(len(text) + 1):
        assert _fed([text[:cut], text[cut:]], prompt) == (thinking, content)


@pytest.mark.parametrize(("text", "prompt", "thinking", "content"), CASES)
def test_truncated(text: str, prompt: str, thinking: str, content: str) -> None:
    """Whatever is cut off, text is neither lost nor shown on the wrong side, spaces and tags apart."""
    for end in range(len(text)):
        once, twice = _fed([text[:end]], prompt), _fed([*text[:end]], prompt)
        assert once == twice
        if once[0]:
            assert thinking.startswith(once[0].rstrip("</think>")) or once[0].startswith(thinking)


def test_nothing_is_held_back_longer_than_needed() -> None:
    parser = ThinkingParser(DEFAULT_TAGS)
    assert parser.feed("<think>a") == [ChatEvent(thinking="a")]
    assert parser.feed("b</") == [ChatEvent(thinking="b")]
    assert parser.feed("p>") == [ChatEvent(thinking="</p>")]
    assert parser.feed("</think>\n") == []
    assert parser.feed("x</thi") == [ChatEvent(content="x</thi")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}", ("<think>", "</think>")),
        (
            "{{ range $i, $_ := .Messages }}<a>\n{{ if (and $.IsThinkSet .Thinking) -}}\n<think>\n{{ .Thinking }}\n</think>\n"
            "{{ end -}}{{ .Content }}<e>{{ end }}",
            ("<think>", "</think>"),
        ),
        (
            "{{ range .Messages }}<|channel|>analysis<|message|>{{ .Thinking }}<|end|>{{ end }}",
            ("<|channel|>analysis<|message|>", "<|end|>"),
        ),
        ("{{ range .Messages }}<b>\n<t>{{ .Thinking }}</t>\n\n{{ .Content }}<e>{{ end }}", ("<t>", "</t>")),
        ("{{ range .Messages }}{{ .Thinking }}</t>{{ end }}", None),
        ("<t>{{ .Thinking }}</t>{{ range .Messages }}{{ .Content }}{{ end }}", None),
        ("{{ range .Tools }}<t>{{ .Thinking }}</t>{{ end }}", None),
        ("{{ range .Messages }}{{ if .Thinking }}x{{ end }}{{ end }}", None),
    ],
)
def test_tags_of_go_templates(source: str, expected: tuple[str, str] | None) -> None:
    assert infer_tags(Template.parse(source)) == expected


def test_formats_give_the_parser_that_fits() -> None:
    go = GoFormat("{{ range .Messages }}{{ if .Thinking }}[T]{{ .Thinking }}[/T]{{ end }}{{ .Content }}{{ end }}")
    assert "thinking" in go.capabilities
    assert _joined(go.parser(prompt="x", think=True).feed("[T]a[/T]b", done=True)) == ("a", "b")
    assert _joined(go.parser(prompt="x", think=False).feed("[T]a[/T]b", done=True)) == ("", "[T]a[/T]b")
    jinja = JinjaFormat("{{ messages[0].content }}<think></think>", SpecialTokens())
    assert _joined(jinja.parser(prompt="x<think>\n").feed("a</think>b", done=True)) == ("a", "b")
    plain = JinjaFormat("{{ messages[0].content }}", SpecialTokens())
    assert _joined(plain.parser(prompt="x<think>\n", think=True).feed("a</think>b", done=True)) == ("", "a</think>b")
