"""OpenAI's chat messages, and their translation to Ollama's. Pure functions; what cannot be honoured is a BadRequest."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec

from ollamapy.api.messages import Message, ToolCall, ToolCallFunction
from ollamapy.errors import BadRequest

_IMAGE_PREFIXES = tuple(f"data:{kind};base64," for kind in ("image/jpeg", "image/jpg", "image/png", "image/webp", ""))


class CallFunction(msgspec.Struct):
    name: str = ""
    arguments: str = "{}"


class Call(msgspec.Struct):
    function: CallFunction
    id: str = ""


class ChatMessage(msgspec.Struct):
    role: str
    content: Any = None
    reasoning: str = ""
    tool_calls: list[Call] = []
    name: str = ""
    tool_call_id: str = ""


def translated(given: ChatMessage, all_messages: list[ChatMessage]) -> list[Message]:
    """One message of ours per content part, as Ollama does."""
    calls = [_tool_call(call) for call in given.tool_calls] or None
    name = given.name or _called(given.tool_call_id, all_messages) if given.role == "tool" else ""
    if isinstance(given.content, list):
        made = [Message(role=given.role, content=_text_of(part)) for part in given.content]
    elif isinstance(given.content, str) or (given.content is None and given.tool_calls):
        made = [Message(role=given.role, content=given.content or "", thinking=given.reasoning)]
    else:
        raise BadRequest(f"invalid message content type: {type(given.content).__name__}")
    for message in made:
        message.tool_name, message.tool_call_id = name, given.tool_call_id
    if made and calls:
        made[-1].tool_calls = calls
    return made


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image_url" and isinstance(part, dict):
        image = part.get("image_url")
        _check_image(image.get("url") if isinstance(image, dict) else image)
        raise BadRequest("image_url: images are not supported yet")
    if kind == "input_audio":
        raise BadRequest("input_audio: audio is not supported yet")
    raise BadRequest("invalid message format")


def _check_image(url: object) -> None:
    if isinstance(url, str) and url.startswith(("http://", "https://")):
        raise BadRequest("image URLs are not currently supported, please use base64 encoded data instead")
    prefix = next((p for p in _IMAGE_PREFIXES if isinstance(url, str) and url.startswith(p)), None)
    if prefix is None or not isinstance(url, str):
        raise BadRequest("invalid image input")
    try:
        base64.b64decode(url[len(prefix) :], validate=True)
    except binascii.Error:
        raise BadRequest("invalid image input") from None


def _tool_call(call: Call) -> ToolCall:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        raise BadRequest("invalid tool call arguments") from None
    return ToolCall(id=call.id, function=ToolCallFunction(name=call.function.name, arguments=arguments))


def _called(call_id: str, messages: list[ChatMessage]) -> str:
    """Name of the function that was called under this id, latest first."""
    calls = (call for message in reversed(messages) for call in message.tool_calls)
    return next((call.function.name for call in calls if call.id == call_id), "")
