"""Messages and tools as the values that Ollama's Go templates see: field names, types and JSON forms. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ollamapy.api.messages import Message, Tool, ToolCall
from ollamapy.chat.gotemplate.values import JSONList, JSONMap, NilList, NilMap, OrderedMap, StringOrList, Struct


class MessageValue(Struct):
    type_name = "*template.templateMessage"
    fields: ClassVar = {
        name: (name, False) for name in ("Role", "Content", "Thinking", "Images", "ToolCalls", "ToolName", "ToolCallID")
    }


class ToolCallValue(Struct):
    type_name = "template.templateToolCall"
    fields: ClassVar = {name: (name, False) for name in ("ID", "Function")}


class CalledFunction(Struct):
    type_name = "template.templateToolCallFunction"
    fields: ClassVar = {name: (name, False) for name in ("Index", "Name", "Arguments")}


class ToolValue(Struct):
    type_name = "template.templateTool"
    prints_json = True
    fields: ClassVar = {"Type": ("type", False), "Items": ("items", True), "Function": ("function", False)}


class FunctionValue(Struct):
    type_name = "template.templateToolFunction"
    fields: ClassVar = {
        "Name": ("name", False),
        "Description": ("description", False),
        "Parameters": ("parameters", False),
    }


class Parameters(Struct):
    type_name = "template.templateToolFunctionParameters"
    fields: ClassVar = {
        "Type": ("type", False),
        "Defs": ("$defs", True),
        "Items": ("items", True),
        "Required": ("required", True),
        "Properties": ("properties", False),
    }


class Property(Struct):
    type_name = "api.ToolProperty"
    fields: ClassVar = {
        "AnyOf": ("anyOf", True),
        "Type": ("type", True),
        "Items": ("items", True),
        "Description": ("description", True),
        "Enum": ("enum", True),
        "Properties": ("properties", True),
        "Required": ("required", True),
    }


class Properties(JSONMap):
    """Parameters by name; one that is not there is an empty one."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, default) or _property({})


class NilProperties(Properties, NilMap):
    """No properties: prints as {}, null in JSON."""


def _plain(value: Any) -> Any:
    """A decoded JSON value as Go decodes it: every number is a float."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else NilList()


def _property(schema: Any) -> Property:
    schema = schema if isinstance(schema, dict) else {}
    kind, nested = schema.get("type"), schema.get("properties")
    return Property(
        AnyOf=[_property(option) for option in schema.get("anyOf") or ()],
        Type=StringOrList([kind] if isinstance(kind, str) else _strings(kind)),
        Items=_plain(schema.get("items")),
        Description=str(schema.get("description") or ""),
        Enum=_plain(schema.get("enum") or []),
        Properties=OrderedMap({name: _property(value) for name, value in nested.items()}) if isinstance(nested, dict) else None,
        Required=_strings(schema.get("required")),
    )


def _tool(tool: Tool) -> ToolValue:
    function = tool.function
    schema = function.get("parameters")
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    return ToolValue(
        Type=tool.type,
        Items=_plain(tool.items),
        Function=FunctionValue(
            Name=str(function.get("name") or ""),
            Description=str(function.get("description") or ""),
            Parameters=Parameters(
                Type=str(schema.get("type") or ""),
                Defs=_plain(schema.get("$defs")),
                Items=_plain(schema.get("items")),
                Required=_strings(schema.get("required")),
                Properties=Properties({name: _property(value) for name, value in properties.items()})
                if isinstance(properties, dict)
                else NilProperties(),
            ),
        ),
    )


def _call(call: ToolCall) -> ToolCallValue:
    function = call.function
    arguments = JSONMap(_plain(function.arguments))
    return ToolCallValue(
        ID=call.id, Function=CalledFunction(Index=function.index or 0, Name=function.name, Arguments=arguments)
    )


def message_value(message: Message, content: str) -> MessageValue:
    return MessageValue(
        Role=message.role,
        Content=content,
        Thinking=message.thinking,
        Images=list(message.images) if message.images else NilList(),
        ToolCalls=[_call(call) for call in message.tool_calls] if message.tool_calls else NilList(),
        ToolName=message.tool_name,
        ToolCallID=message.tool_call_id,
    )


def tools_value(tools: Sequence[Tool]) -> JSONList | NilList:
    """`.Tools`: prints as JSON; nil, so false and printed as an empty list, when there are none."""
    return JSONList([_tool(tool) for tool in tools]) if tools else NilTools()


class NilTools(JSONList, NilList):
    """No tools: prints as null."""


def think_values(think: bool | str | None) -> Mapping[str, Any]:
    """`.Think`, `.ThinkLevel` ("medium" for plain true) and `.IsThinkSet`."""
    level = think if isinstance(think, str) else "medium" if think else ""
    return {"Think": bool(think), "ThinkLevel": level, "IsThinkSet": think is not None}
