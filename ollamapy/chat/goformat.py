"""The chat format of a Go template: Ollama's modes (messages, prompt and response, suffix) over the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ollamapy.api.messages import Message, Tool
from ollamapy.chat.capabilities import go_capabilities, parse_go
from ollamapy.chat.godata import message_value, think_values, tools_value
from ollamapy.chat.gotemplate import nodes
from ollamapy.chat.images import marked_contents
from ollamapy.chat.interface import ChatFormat, Parser, PlainParser, Think
from ollamapy.chat.thinking import ThinkingParser, infer_tags
from ollamapy.chat.toolcalls import style_of


class GoFormat(ChatFormat):
    """Raises TemplateError when the template does not parse."""

    def __init__(self, source: str, name: str = "template") -> None:
        template = parse_go(source)
        variables = template.variables()
        if not variables & {".Messages", ".Response"}:
            template = template.with_root([*template.root, _RESPONSE])
        self.name = name
        self.stops = ()
        self.capabilities = go_capabilities(template)
        self.call_style = style_of(source)
        self._template = template
        self._opening = template.with_root(_cut_after_response(template.root)[0])
        self._by_messages = ".Messages" in variables
        self._tags = infer_tags(template)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), think: Think = None) -> str:
        system, turns = _collate(messages)
        if not self._by_messages:
            return self._render_turns(turns, think_values(think))
        return self._template.execute(
            {
                "System": system,
                "Messages": [message_value(message, content) for message, content in turns],
                "Tools": tools_value(tools),
                "Response": "",
                **think_values(think),
            }
        )

    def render_completion(self, prompt: str, *, system: str = "", suffix: str = "", think: Think = None) -> str:
        if prompt and suffix:
            return self._template.execute({"Prompt": prompt, "Suffix": suffix, "Response": "", **think_values(think)})
        return super().render_completion(prompt, system=system, think=think)

    def parser(self, *, prompt: str, think: Think = None) -> Parser:
        if self._tags is None or think is False:
            return PlainParser()
        return ThinkingParser(self._tags, prompt)

    def _render_turns(self, turns: Sequence[tuple[Message, str]], think: Mapping[str, Any]) -> str:
        """For templates that know no messages: one execution per (system, prompt, response), the last one left open.

        The open turn ends where the template writes the response, which may hold the start of the answer.
        """
        pieces: list[str] = []
        turn = {"System": "", "Prompt": "", "Response": ""}
        for message, content in turns:
            slot = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(message.role)
            closes = {"System": turn["Prompt"] or turn["Response"], "Prompt": turn["Response"]}.get(slot or "")
            if closes:
                pieces.append(self._template.execute({**turn, **think}))
                turn = {"System": "", "Prompt": "", "Response": ""}
            if slot:
                turn[slot] = content
        pieces.append(self._opening.execute({**turn, **think}))
        return "".join(pieces)


_RESPONSE = nodes.Action(1, nodes.Pipe(1, (), False, [nodes.Command(1, [nodes.Field(1, ("Response",))])]))


def _collate(messages: Sequence[Message]) -> tuple[str, list[tuple[Message, str]]]:
    """All system texts joined, and the messages with neighbours of one role merged (tool results stay apart)."""
    contents = marked_contents(messages)
    system = [content for message, content in zip(messages, contents, strict=True) if message.role == "system"]
    turns: list[tuple[Message, str]] = []
    for message, content in zip(messages, contents, strict=True):
        if turns and turns[-1][0].role == message.role != "tool":
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n\n{content}")
        else:
            turns.append((message, content))
    return "\n\n".join(system), turns


def _cut_after_response(body: Sequence[nodes.Node]) -> tuple[list[nodes.Node], bool]:
    """`body` without what follows the first action that writes `.Response`, and whether there is one.

    An action that does more with the response after naming it (`.Response | printf "%s!"`) goes too.
    """
    kept: list[nodes.Node] = []
    for node in body:
        cut = False
        if isinstance(node, nodes.Action):
            cut = _names_response(node.pipe)
            if cut and not _names_response(node.pipe.commands[-1]):
                return kept, True
        elif isinstance(node, (nodes.If, nodes.With)):
            node, cut = _cut_branches(node)
        elif isinstance(node, nodes.Range):
            inner, cut = _cut_after_response(node.body)
            node = replace(node, body=inner, otherwise=[] if cut else node.otherwise)
        kept.append(node)
        if cut:
            return kept, True
    return kept, False


def _names_response(node: nodes.Node) -> bool:
    return any(isinstance(part, nodes.Field) and "Response" in part.names for part in nodes.walk([node]))


def _cut_branches(node: nodes.If | nodes.With) -> tuple[nodes.If | nodes.With, bool]:
    """Branches after the one that writes the response keep their conditions and lose their bodies."""
    branches: list[nodes.Branch] = []
    cut = False
    for branch in node.branches:
        body: list[nodes.Node] = []
        if not cut:
            body, cut = _cut_after_response(branch.body)
        branches.append(replace(branch, body=body))
    otherwise: list[nodes.Node] = []
    if not cut:
        otherwise, cut = _cut_after_response(node.otherwise)
    return replace(node, branches=branches, otherwise=otherwise), cut
