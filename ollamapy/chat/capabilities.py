"""What a model can do, read from its metadata and templates, and which of its two templates serves its chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ollamapy.chat.gotemplate import Template
from ollamapy.chat.thinking import infer_tags
from ollamapy.errors import TemplateError

CHAT_TEMPLATE = "tokenizer.chat_template"
_TOOL_RESULTS = (
    "tool_response",
    "tool_results",
    "role'] == 'tool'",
    'role\'] == "tool"',
    "role\"] == 'tool'",
    'role"] == "tool"',
    "message.role == 'tool'",
    'message.role == "tool"',
    "ipython",
)


@lru_cache(maxsize=64)
def parse_go(source: str) -> Template:
    """`Template.parse`, remembering the last 64 sources."""
    return Template.parse(source)


def go_capabilities(template: Template) -> frozenset[str]:
    variables = template.variables()
    return frozenset(
        name
        for name, present in (
            ("tools", ".Tools" in variables),
            ("insert", ".Suffix" in variables),
            ("thinking", infer_tags(template) is not None),
        )
        if present
    )


def jinja_capabilities(template: str) -> frozenset[str]:
    """Tools and thinking, from the words a Jinja chat template uses."""
    tools = "tools" in template or "tool_call" in template
    strips = "content.split('</think>')" in template or 'content.split("</think>")' in template
    strips = strips and "reasoning_content" not in template and "<SPECIAL_12>" not in template
    thinking = ("<think>" in template and "</think>" in template) or strips
    return frozenset(name for name, present in (("tools", tools), ("thinking", thinking)) if present)


def _go_round_trip(template: Template) -> bool:
    """Whether a Go template renders tools, calls and their results."""
    results = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
    return {".Tools", ".ToolCalls"} <= template.variables() and any(text in template.source for text in results)


def _jinja_round_trip(template: str) -> bool:
    calls = "tool_calls" in template or "assistant_tool_call" in template
    return calls and any(text in template for text in _TOOL_RESULTS)


def prefers_jinja(go: Template, jinja: str, go_template: bool | None) -> bool:
    """Whether the GGUF's Jinja template serves chats although the model has a Go TEMPLATE.

    `go_template` (OLLAMA_GO_TEMPLATE) decides when it is set. Else Jinja wins when it can do more, or when only it
    renders a whole round of tool use.
    """
    if go_template is not None or not jinja:
        return go_template is False and bool(jinja)
    ours, theirs = go_capabilities(go) - {"insert"}, jinja_capabilities(jinja)
    full_ours, full_theirs = _go_round_trip(go), _jinja_round_trip(jinja)
    if len(theirs) > len(go_capabilities(go)):
        return not full_ours or full_theirs
    return ours == theirs and "tools" in ours and full_theirs and not full_ours


def capabilities(
    metadata: Mapping[str, Any],
    template: str | None,
    has_projector: bool,
    extra: Sequence[str] = (),
    go_template: bool | None = None,
) -> list[str]:
    """The names `/api/show` lists. `template` is the model's Go TEMPLATE; one that does not parse adds nothing."""
    architecture = str(metadata.get("general.architecture", ""))
    found = ["embedding" if f"{architecture}.pooling_type" in metadata else "completion"]
    if has_projector or f"{architecture}.vision.block_count" in metadata:
        found.append("vision")
    if f"{architecture}.audio.block_count" in metadata:
        found.append("audio")
    jinja = str(metadata.get(CHAT_TEMPLATE, ""))
    found += sorted(_template_capabilities(template, jinja, go_template), key=("tools", "insert", "thinking").index)
    if architecture in ("gptoss", "gpt-oss"):
        found.append("thinking")
    return list(dict.fromkeys([*found, *extra]))


def _template_capabilities(template: str | None, jinja: str, go_template: bool | None) -> frozenset[str]:
    """Of the template that serves the model's chats."""
    if not template:
        return jinja_capabilities(jinja)
    try:
        go = parse_go(template)
    except TemplateError:
        return frozenset()
    return jinja_capabilities(jinja) if prefers_jinja(go, jinja, go_template) else go_capabilities(go)
