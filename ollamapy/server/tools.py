"""A request's tools: which are shown and which may or must be called, and the grammar of an answer that must call.

A grammar is made of the model's own way to write calls (`chat.toolcalls`) and each tool's schema of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ollamapy.api.messages import Tool
from ollamapy.api.types import ChatRequest
from ollamapy.chat.interface import CallStyle, Parser
from ollamapy.chat.toolcalls import ToolParser
from ollamapy.errors import BadRequest
from ollamapy.server.structured import MAX_BYTES, Formats, grammar_text
from ollamapy.tokenizer import Tokenizer

MAX_TOOLS = 128


class ToolUse(NamedTuple):
    """`tools` are shown to the model; with `required`, it calls one of `allowed`, and with `several` more."""

    tools: Sequence[Tool]
    allowed: tuple[str, ...]
    required: bool
    several: bool

    def parser(self, style: CallStyle, inner: Parser) -> ToolParser:
        return ToolParser(inner, style, {_name(tool) for tool in self.tools})

    async def check(self, formats: Formats) -> dict[str, dict[str, Any]]:
        """The parameters of each tool that must be called, as entries of llguidance. Raises BadRequest that names it."""
        found = {}
        for tool in self.tools if self.required else ():
            name = _name(tool)
            if name not in self.allowed:
                continue
            schema = tool.function.get("parameters") or {"properties": {}}
            if not isinstance(schema, dict) or schema.get("type", "object") != "object":
                raise BadRequest(f"tools: {name}: parameters must be a JSON Schema of an object")
            try:
                checked = await formats.check({**schema, "type": "object"})
            except BadRequest as error:
                raise BadRequest(f"tools: {name}: {error}") from None
            assert checked is not None
            found[name] = checked.entry
        if sum(len(msgspec.json.encode(entry)) for entry in found.values()) > MAX_BYTES:
            raise BadRequest(f"tools: their parameters are more than {MAX_BYTES} bytes of JSON")
        return found

    def grammar(self, style: CallStyle, entries: dict[str, dict[str, Any]], inner: Parser, tokenizer: Tokenizer) -> str:
        """Of an answer that is one call, or with `several` one at least; thinking before it is free."""
        head = f'{{{{"name": {{}}, "{style.arguments}": '
        calls = [f'{_quoted(head.format(_quoted(name)))} @args{at} "}}"' for at, name in enumerate(entries)]
        body = call = f"({' | '.join(calls)})"
        opening, closing = _tag(style.opening, tokenizer), _tag(style.closing, tokenizer)
        more = self.several and style.several
        if style.listed:
            body = f'{opening} " "? "[" {call}' + (f' (", " {call})*' if more else "") + ' "]"'
        elif opening:
            body = f'{opening} "\\n" {call} "\\n" {closing}'
            body += f' ("\\n" {body})*' if more else ""
        named = [{"name": f"args{at}", **entry} for at, entry in enumerate(entries.values())]
        return grammar_text(body, named, inner)


def tool_use(request: ChatRequest) -> ToolUse | None:
    """None where no tool is to be seen. Raises BadRequest for tools or a choice that make no sense."""
    choice = request.tool_choice
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    wanted = named.get("name") if isinstance(named, dict) else None
    if choice not in (None, "none", "auto", "required") and not isinstance(wanted, str):
        raise BadRequest("tool_choice must be none, auto, required, or name a function")
    required = choice == "required" or wanted is not None
    if not request.tools or choice == "none":
        if required:
            raise BadRequest("tool_choice: there are no tools")
        return None
    if len(request.tools) > MAX_TOOLS:
        raise BadRequest(f"tools: more than {MAX_TOOLS}")
    names = tuple(_name(tool) for tool in request.tools)
    if len(set(names)) < len(names):
        raise BadRequest("tools: two have one name")
    if wanted is not None and wanted not in names:
        raise BadRequest(f"tool_choice: there is no tool {wanted!r}")
    if required and (request.format not in (None, "") or request.grammar or request.options.get("grammar")):
        raise BadRequest("tool_choice: an answer that must be a call cannot be held to a format besides")
    return ToolUse(request.tools, names if wanted is None else (wanted,), required, request.parallel_tool_calls)


def _name(tool: Tool) -> str:
    name = tool.function.get("name")
    if tool.type != "function" or not isinstance(name, str) or not name:
        raise BadRequest("tools: each must be a function with a name")
    return name


def _quoted(text: str) -> str:
    """As a string of JSON and of Lark."""
    return msgspec.json.encode(text).decode()


def _tag(tag: str, tokenizer: Tokenizer) -> str:
    """As text, or as the token it is when that has no text."""
    ids = tokenizer.encode(tag) if tag else []
    if len(ids) == 1 and tokenizer.is_control(ids[0]):
        return f"<[{ids[0]}]>"
    return _quoted(tag) if tag else ""
