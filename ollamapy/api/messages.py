"""Chat messages and tools as they stand on Ollama's wire; shared by the API types and the chat formats."""

from __future__ import annotations

from typing import Any

import msgspec


class ToolCallFunction(msgspec.Struct, omit_defaults=True):
    name: str
    arguments: dict[str, Any] = {}
    """Key order is kept."""
    index: int | None = None


class ToolCall(msgspec.Struct, omit_defaults=True):
    function: ToolCallFunction
    id: str = ""


class Message(msgspec.Struct, omit_defaults=True):
    """One turn. `role` is system, user, assistant, tool, or any other name a template knows."""

    role: str
    content: str | None = ""
    thinking: str = ""
    images: list[str] | None = None
    """Base64."""
    tool_calls: list[ToolCall] | None = None
    tool_name: str = ""
    tool_call_id: str = ""


class AnswerMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: str
    content: str
    thinking: str = ""
    tool_calls: list[ToolCall] = []


class Tool(msgspec.Struct, omit_defaults=True):
    """A function the model may call. `function` is kept as the client sent it, in its key order."""

    type: str = "function"
    function: dict[str, Any] = {}
    items: Any = None
