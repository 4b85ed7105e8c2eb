"""A request's tools: which are shown and which may or must be called, and the grammar of an answer that must call.

A grammar is made of the model's own way to write calls (`chat.toolcalls`) and each tool's schema of parameters. Where the model
may call, it sleeps until the model's own marker of a call: text before it is what it is without a grammar. That is done where
the marker is one token of the vocabulary, which no text spells; where it is spelled, only when a tool is `strict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ollamapy.api.messages import Tool
from ollamapy.api.types import ChatRequest
from ollamapy.chat.interface import CallStyle, Parser
from ollamapy.chat.thinking import ThinkingParser
from ollamapy.chat.toolcalls import ToolParser
from ollamapy.engine.protocol import Trigger
from ollamapy.errors import BadRequest
from ollamapy.server.structured import LAYOUT, MAX_BYTES, Formats, grammar_text
from ollamapy.tokenizer import Tokenizer

MAX_TOOLS = 128
_ANY_OBJECT: dict[str, Any] = {"json_schema": {"type": "object", "x-guidance": LAYOUT}}


class ToolUse(NamedTuple):
    """`tools` are shown to the model; with `required`, it calls one of `allowed`, and with `several` more."""

    tools: Sequence[Tool]
    allowed: tuple[str, ...]
    required: bool
    several: bool

    def parser(self, style: CallStyle, inner: Parser) -> ToolParser:
        return ToolParser(inner, style, {_name(tool) for tool in self.tools})

    async def check(self, formats: Formats, warnings: list[str]) -> dict[str, dict[str, Any]]:
        """The parameters of each tool that may be called, as entries of llguidance.

        Raises BadRequest that names the tool when it must be called or is strict; else its arguments are any object, and a
        warning says so.
        """
        tools = [tool for tool in self.tools if _name(tool) in self.allowed]
        schemas = [_parameters(tool) for tool in tools]
        answers = iter(await formats.check_all([schema for schema in schemas if not isinstance(schema, BadRequest)]))
        found: dict[str, dict[str, Any]] = {}
        for tool, schema in zip(tools, schemas, strict=True):
            answer, name = schema if isinstance(schema, BadRequest) else next(answers), _name(tool)
            if not isinstance(answer, BadRequest):
                found[name] = answer.entry
            elif self.required or _strict(tool):
                raise BadRequest(f"tools: {name}: {answer}")
            else:
                warnings.append(f"tools: {name}: the arguments of its calls are not held to its parameters: {answer}")
                found[name] = _ANY_OBJECT
        if sum(len(msgspec.json.encode(entry)) for entry in found.values()) > MAX_BYTES:
            text = f"tools: their parameters are more than {MAX_BYTES} bytes of JSON"
            if self.required or any(map(_strict, self.tools)):
                raise BadRequest(text)
            warnings.append(f"{text}: the arguments of calls are not held to them")
            return {}
        return found

    async def sleeping(
        self, style: CallStyle, inner: Parser, tokenizer: Tokenizer, formats: Formats, warnings: list[str]
    ) -> tuple[str, Trigger | None]:
        """For a model that may call: the grammar of one call, or one list of them, from behind its marker to its end, and what
        wakes it. Nothing where nothing tells a call from text."""
        ids = tokenizer.encode(style.opening) if style.opening else []
        if not ids or (len(ids) > 1 and not any(map(_strict, self.tools))):
            return "", None
        entries = await self.check(formats, warnings)
        if not entries:
            return "", None
        trigger = Trigger(token_id=ids[0]) if len(ids) == 1 else Trigger(text=style.opening)
        if isinstance(inner, ThinkingParser):
            trigger = msgspec.structs.replace(trigger, thinking=tuple(inner.tags), in_thinking=inner.opened)
        call, named = self._call(style, entries)
        if style.listed:
            more = f' (SPACES? "," SPACES? {call})*' if self.several and style.several else ""
            body = f'SPACES? "[" SPACES? {call}{more} SPACES? "]"'
        else:
            body = f"SPACES? {call} SPACES? {_tag(style.closing, tokenizer)}"
        return grammar_text(f"{body}\nSPACES: /[ \\t\\r\\n]{{1,8}}/", named, None), trigger

    def grammar(self, style: CallStyle, entries: dict[str, dict[str, Any]], inner: Parser, tokenizer: Tokenizer) -> str:
        """Of an answer that is one call, or with `several` one at least; thinking before it is free."""
        call, named = self._call(style, entries)
        body = call
        opening, closing = _tag(style.opening, tokenizer), _tag(style.closing, tokenizer)
        more = self.several and style.several
        if style.listed:
            body = f'{opening} " "? "[" {call}' + (f' (", " {call})*' if more else "") + ' "]"'
        elif opening:
            body = f'{opening} "\\n" {call} "\\n" {closing}'
            body += f' ("\\n" {body})*' if more else ""
        return grammar_text(body, named, inner)

    @staticmethod
    def _call(style: CallStyle, entries: dict[str, dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        """A call of one of them as a Lark expression, and the entries that it names."""
        head = f'{{{{"name": {{}}, "{style.arguments}": '
        calls = [f'{_quoted(head.format(_quoted(name)))} @args{at} "}}"' for at, name in enumerate(entries)]
        named = [{"name": f"args{at}", **entry} for at, entry in enumerate(entries.values())]
        return f"({' | '.join(calls)})", named


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


def _parameters(tool: Tool) -> dict[str, Any] | BadRequest:
    schema = tool.function.get("parameters") or {"properties": {}}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return BadRequest("parameters must be a JSON Schema of an object")
    return {**schema, "type": "object"}


def _strict(tool: Tool) -> bool:
    return tool.function.get("strict") is True


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
