"""Which chat format serves a model: the one place that knows all of them and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ollamapy.chat.capabilities import CHAT_TEMPLATE, parse_go, prefers_jinja
from ollamapy.chat.goformat import GoFormat
from ollamapy.chat.interface import ChatEvent, ChatFormat, Parser, SpecialTokens, Think
from ollamapy.chat.jinjaformat import JinjaFormat

BUILTIN: dict[str, Callable[[SpecialTokens], ChatFormat]] = {}
"""Formats written in Python, by the names that a model's RENDERER and PARSER use."""

PLAIN = "{{ .Prompt }}"


def choose(
    *,
    template: str | None,
    metadata: Mapping[str, Any],
    go_template: bool | None,
    special: SpecialTokens,
    request_template: str | None = None,
    builtin: str = "",
) -> ChatFormat:
    """The format of a request to a model. Raises TemplateError when the one chosen does not parse.

    In order: the request's Go template; the format named `builtin`; the model's Go TEMPLATE, unless its GGUF's Jinja
    template does better or OLLAMA_GO_TEMPLATE (`go_template`) says no; the GGUF's Jinja template; the bare prompt.
    """
    if request_template:
        return GoFormat(request_template)
    if builtin in BUILTIN:
        return BUILTIN[builtin](special)
    jinja = str(metadata.get(CHAT_TEMPLATE) or "")
    if template and not prefers_jinja(parse_go(template), jinja, go_template):
        return GoFormat(template)
    if jinja:
        return JinjaFormat(jinja, special)
    return GoFormat(PLAIN, name="plain")


__all__ = ["BUILTIN", "ChatEvent", "ChatFormat", "Parser", "SpecialTokens", "Think", "choose"]
