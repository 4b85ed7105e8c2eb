"""The chat format of a Jinja chat template: what the template is given, continuation of a last turn, stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ollamapy.api.messages import Message, Tool, ToolCall
from ollamapy.chat import jinja
from ollamapy.chat.capabilities import jinja_capabilities
from ollamapy.chat.images import marked_contents
from ollamapy.chat.interface import ChatFormat, Parser, PlainParser, SpecialTokens, Think
from ollamapy.chat.thinking import DEFAULT_TAGS, ThinkingParser
from ollamapy.chat.toolcalls import style_of
from ollamapy.errors import TemplateError

_OPEN_END = "CONTINUED-HERE-5bd1 "  # marks where an unfinished answer ends; its space shows whether ends are trimmed
_USER, _ANSWER = "question-91c7", "answer-4e02"
_TAG = re.compile(r"</?[^\s<>]{1,40}>|<\|[^<>]{1,40}\|>|\[/?[A-Z_]{2,24}\]")


class JinjaFormat(ChatFormat):
    """Raises TemplateError when the template does not compile."""

    def __init__(self, source: str, special: SpecialTokens, name: str = "chat_template") -> None:
        jinja.compile_template(source)
        self.name = name
        self.capabilities = jinja_capabilities(source)
        self.call_style = style_of(source)
        self._source = source
        self._special = special
        self.stops = self._find_stops()

    def render(self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), think: Think = None) -> str:
        shown = [_message(message, text) for message, text in zip(messages, marked_contents(messages), strict=True)]
        variables = self._variables(tools, think)
        if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
            return jinja.render(self._source, {**variables, "messages": shown, "add_generation_prompt": True})
        shown[-1]["content"] += _OPEN_END
        text = jinja.render(self._source, {**variables, "messages": shown, "add_generation_prompt": False})
        end = text.rfind(_OPEN_END.strip())
        if end < 0:
            raise TemplateError("the chat template cannot continue an assistant message")
        return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()

    def parser(self, *, prompt: str, think: Think = None) -> Parser:
        if "thinking" not in self.capabilities or think is False:
            return PlainParser()
        return ThinkingParser(DEFAULT_TAGS, prompt)

    def _variables(self, tools: Sequence[Tool], think: Think) -> dict[str, Any]:
        variables: dict[str, Any] = {"tools": [_tool(tool) for tool in tools] or None, "documents": None}
        if self._special.bos:
            variables["bos_token"] = self._special.bos
        if self._special.eos:
            variables["eos_token"] = self._special.eos
        if think is not None:
            variables |= {"enable_thinking": bool(think), "thinking": bool(think)}
        if isinstance(think, str):
            variables["reasoning_effort"] = think
        return variables

    def _find_stops(self) -> tuple[str, ...]:
        """Texts with which the template ends an answer and begins the next turn.

        A chat of question, answer and question is rendered, and what stands between the answer and the second question
        is looked at: its first special token or tag-like text ends a turn. Where there is none, turns are told apart
        by plain words ("### Instruction:"), and the last line of them is the stop. A template that cannot render this
        chat, or writes nothing there but spaces, has none.
        """
        turns = [("user", _USER), ("assistant", _ANSWER), ("user", _USER)]
        messages = [{"role": role, "content": content} for role, content in turns]
        variables = {**self._variables((), None), "messages": messages, "add_generation_prompt": False}
        try:
            text = jinja.render(self._source, variables)
        except TemplateError:
            return ()
        between = text.partition(_ANSWER)[2].partition(_USER)[0]
        special = {token for token in (self._special.bos, self._special.eos, *self._special.others) if token}
        found = [(between.find(token), token) for token in special if token in between]
        found += [(match.start(), match.group()) for match in _TAG.finditer(between)]
        if found:
            return (min(found)[1],)
        lines = between.strip().splitlines()
        return (lines[0].strip(),) if lines else ()


def _message(message: Message, content: str) -> dict[str, Any]:
    """As transformers' templates expect it; fields that are not set are not there."""
    shown: dict[str, Any] = {"role": message.role, "content": content}
    if message.thinking:
        shown |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        shown["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_name:
        shown["name"] = message.tool_name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    return shown


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


def _tool(tool: Tool) -> dict[str, Any]:
    return {"type": tool.type, "function": tool.function}
