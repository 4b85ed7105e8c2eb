"""Telling a model's thinking from its answer by tags, and finding a Go template's tags. Knows no tool calls.

States: seeking (only spaces so far), eating the spaces after the opening tag, thinking, eating the spaces after the
closing tag, done. Without an opening tag at the start, all is content, spaces included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import NamedTuple

from ollamapy.chat.gotemplate import Template, nodes
from ollamapy.chat.interface import ChatEvent, Parser
from ollamapy.chat.tags import split


class ThinkingTags(NamedTuple):
    opening: str
    closing: str


DEFAULT_TAGS = ThinkingTags("<think>", "</think>")


class _State(Enum):
    SEEKING = auto()
    EATING_AFTER_OPENING = auto()
    THINKING = auto()
    EATING_AFTER_CLOSING = auto()
    DONE = auto()


class ThinkingParser(Parser):
    """Splits thinking from content. A prompt that ends with the opening tag puts the model inside its thinking."""

    def __init__(self, tags: ThinkingTags, prompt: str = "") -> None:
        self.tags = tags
        self.opened = prompt.rstrip().endswith(tags.opening)
        self._buffer = ""
        self._state = _State.EATING_AFTER_OPENING if self.opened else _State.SEEKING

    def feed(self, text: str, done: bool = False) -> list[ChatEvent]:
        self._buffer += text
        events: list[ChatEvent] = []
        state = None
        while state is not self._state:
            state = self._state
            events += self._step(done)
        return events

    def _step(self, done: bool) -> list[ChatEvent]:
        """What the present state makes of the buffer; may change the state."""
        if self._state is _State.SEEKING:
            return self._seek(done)
        if self._state is _State.THINKING:
            before, tag, self._buffer = split(self._buffer, [self.tags.closing], done)
            if tag:
                self._state = _State.EATING_AFTER_CLOSING
            return [ChatEvent(thinking=before)] if before else []
        if self._state is _State.DONE:
            content, self._buffer = self._buffer, ""
            return [ChatEvent(content=content)] if content else []
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            eaten_opening = self._state is _State.EATING_AFTER_OPENING
            self._state = _State.THINKING if eaten_opening else _State.DONE
        return []

    def _seek(self, done: bool) -> list[ChatEvent]:
        text = self._buffer.lstrip()
        if text.startswith(self.tags.opening):
            self._buffer = text[len(self.tags.opening) :]
            self._state = _State.EATING_AFTER_OPENING
        elif done or not self.tags.opening.startswith(text):
            self._state = _State.DONE
        return []


def infer_tags(template: Template) -> ThinkingTags | None:
    """The texts around `{{ .Thinking }}` in a range over the messages; None when there is no such place.

    Of a text that has several lines, the line next to the thinking is the tag.
    """
    for body in template.templates.values():
        for inner in _bodies_over_messages(body, False):
            for index, node in enumerate(inner):
                if isinstance(node, nodes.Action) and _uses_field(node.pipe, "Thinking"):
                    before = _text_of(inner[max(index - 1, 0)], last_line=True)
                    after = _text_of(inner[min(index + 1, len(inner) - 1)], last_line=False)
                    if before and after:
                        return ThinkingTags(before, after)
    return None


def _bodies_over_messages(body: Sequence[nodes.Node], inside: bool) -> Iterator[Sequence[nodes.Node]]:
    """All lists of nodes inside a range over Messages, outer ones first."""
    if inside:
        yield body
    for node in body:
        if isinstance(node, (nodes.If, nodes.With)):
            for branch in node.branches:
                yield from _bodies_over_messages(branch.body, inside)
            yield from _bodies_over_messages(node.otherwise, inside)
        elif isinstance(node, nodes.Range):
            yield from _bodies_over_messages(node.body, _uses_field(node.pipe, "Messages"))


def _uses_field(pipe: nodes.Pipe, name: str) -> bool:
    return any(isinstance(node, (nodes.Field, nodes.Variable)) and name in node.names for node in nodes.walk([pipe]))


def _text_of(node: nodes.Node, last_line: bool) -> str:
    lines = node.text.strip().splitlines() if isinstance(node, nodes.Text) else []
    return lines[-1 if last_line else 0].strip() if lines else ""
