"""How a model writes its tool calls, told from its template, and finding them in an answer. Knows no grammar and no API.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, again for each (Qwen 2.5 and 3, Hermes)
mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
llama3   {"name": ..., "parameters": {...}} and nothing else (Llama 3.1 and later)
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection
from enum import Enum, auto
from typing import Any

from ollamapy.api.messages import ToolCall, ToolCallFunction
from ollamapy.chat.interface import CallStyle, ChatEvent, Parser
from ollamapy.chat.tags import split

_ID_CHARACTERS = string.ascii_lowercase + string.digits


HERMES = CallStyle("hermes", "<tool_call>", "</tool_call>")
MISTRAL = CallStyle("mistral", "[TOOL_CALLS]", listed=True)
LLAMA3 = CallStyle("llama3", arguments="parameters", several=False)


def style_of(template: str) -> CallStyle | None:
    """By the words of a Go or Jinja template; None for a syntax that is not known here."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template or "[CALL_ID]" in template else MISTRAL
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return LLAMA3
    return None


class _State(Enum):
    START = auto()  # nothing but spaces yet
    TEXT = auto()
    CALL = auto()
    AFTER = auto()  # nothing but spaces and a closing tag since the last call


class ToolParser(Parser):
    """Takes calls of the tools `names` out of what another parser calls content; what is no such call stays content.

    JSON at the beginning of the content is looked at too: the tag may be a token without text, or the style has none.
    """

    def __init__(self, inner: Parser, style: CallStyle, names: Collection[str]) -> None:
        self._inner, self._style, self._names = inner, style, names
        self._state = _State.START
        self._buffer = ""
        self._before = ""  # the tag or spaces in front of the call that is being read
        self._closing = ""  # the tag that may follow the last call
        self._tried = 0  # length of the buffer when it was last decoded
        self._count = 0

    def feed(self, text: str, done: bool = False) -> list[ChatEvent]:
        found: list[ChatEvent] = []
        for event in self._inner.feed(text, done):
            if event.thinking:
                found.append(ChatEvent(thinking=event.thinking))
            self._buffer += event.content
        steps = {_State.START: self._start, _State.TEXT: self._text, _State.CALL: self._call, _State.AFTER: self._rest}
        state = None
        while state is not self._state:
            state = self._state
            found += steps[state](done)
        return found

    def _start(self, done: bool) -> list[ChatEvent]:
        text, opening = self._buffer.lstrip(), self._style.opening
        if opening and text.startswith(opening):
            return self._open(self._buffer[: -len(text)] + opening, text[len(opening) :])
        inside = text[1:].lstrip()
        if text[:1] in ("{", "[") and inside[:1] == ('"' if text[0] == "{" else "{"):
            return self._open(self._buffer[: -len(text)], text)
        undecided = opening.startswith(text) or (text[:1] in ("{", "[") and not inside)
        if done or (text and not undecided):
            self._state = _State.TEXT
        return []

    def _text(self, done: bool) -> list[ChatEvent]:
        opening = self._style.opening
        before, tag, self._buffer = split(self._buffer, [opening] if opening else [], done)
        shown = [ChatEvent(content=before)] if before else []
        return shown + self._open(tag, self._buffer) if tag else shown

    def _open(self, before: str, buffer: str) -> list[ChatEvent]:
        self._state, self._before, self._buffer, self._tried = _State.CALL, before, buffer, 0
        return []

    def _call(self, done: bool) -> list[ChatEvent]:
        ended = done or any(bracket in self._buffer[self._tried :] for bracket in "}]")
        self._tried = len(self._buffer)
        if not ended:
            return []
        text = self._buffer.lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            value, end = None, 0
        if not end and not done:
            return []
        calls = self._calls(value)
        if calls:
            self._state, self._buffer, self._closing = _State.AFTER, text[end:], self._style.closing
            return [ChatEvent(tool_calls=tuple(calls))]
        self._state = _State.TEXT
        return [ChatEvent(content=self._before)] if self._before else []

    def _rest(self, done: bool) -> list[ChatEvent]:
        text, closing = self._buffer.lstrip(" \t\r\n;"), self._closing
        if closing and text.startswith(closing):
            text, self._closing = text[len(closing) :].lstrip(" \t\r\n;"), ""
        if text.startswith("{"):
            return self._open("", text)
        if text and (done or not self._closing.startswith(text)):
            self._state = _State.TEXT
        self._buffer = text
        return []

    def _calls(self, value: Any) -> list[ToolCall]:
        """Empty when anything in `value` is no call."""
        made: list[ToolCall] = []
        for item in value if isinstance(value, list) else [value]:
            given = item if isinstance(item, dict) else {}
            name, arguments = given.get("name"), given.get("arguments", given.get("parameters"))
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            function = ToolCallFunction(name=name, arguments=arguments, index=self._count + len(made))
            made.append(ToolCall(function=function, id="call_" + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))))
        self._count += len(made)
        return made
