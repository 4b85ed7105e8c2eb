"""What a chat format is: it turns messages into a prompt, and a model's text into events. No format is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from ollamapy.api.messages import Message, Tool, ToolCall
from ollamapy.errors import TemplateError

Think = bool | str | None
"""As the request has it: on, off, a level ("low", "medium", "high", "max"), or not said."""


class ChatEvent(NamedTuple):
    """A piece of the answer; the parts of one event belong together in this order: thinking, content, tool calls."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Parser(ABC):
    """One answer's parser. Whatever the pieces `feed` gets, the events joined are the same."""

    @abstractmethod
    def feed(self, text: str, done: bool = False) -> list[ChatEvent]:
        """Events that `text` completes; with `done` also whatever was held back."""


class PlainParser(Parser):
    """All text is content."""

    def feed(self, text: str, done: bool = False) -> list[ChatEvent]:
        return [ChatEvent(content=text)] if text else []


class CallStyle(NamedTuple):
    """Texts around calls: `opening` and `closing` of each, or of the list of them all with `listed`."""

    name: str
    opening: str = ""
    closing: str = ""
    arguments: str = "arguments"
    listed: bool = False
    several: bool = True


class ChatFormat(ABC):
    """Rendering and parsing of one prompt format. Stateless: one object serves all requests of a model."""

    name: str
    stops: tuple[str, ...]
    """Texts at which an answer ends, besides the tokenizer's end-of-generation tokens."""
    capabilities: frozenset[str]
    """Of "tools", "thinking", "insert"."""
    call_style: CallStyle | None = None
    """How the model writes tool calls, where that is known."""

    @abstractmethod
    def render(self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), think: Think = None) -> str:
        """The prompt up to where the answer starts; a final assistant message is left open and continued.

        It may begin with the BOS text, which the tokenizer does not double. Raises TemplateError.
        """

    def render_completion(self, prompt: str, *, system: str = "", suffix: str = "", think: Think = None) -> str:
        """The prompt for a single text: a chat of `system` and `prompt`, or the text between `prompt` and `suffix`."""
        if suffix:
            raise TemplateError(f"the chat format {self.name} does not support insert")
        messages = [Message(role="system", content=system)] if system else []
        return self.render([*messages, Message(role="user", content=prompt)], think=think)

    @abstractmethod
    def parser(self, *, prompt: str, think: Think = None) -> Parser:
        """A parser for one answer to `prompt` (the rendered text)."""


class SpecialTokens(NamedTuple):
    """Texts of a tokenizer's special tokens; "" where there is none. `others` may hold more that end a turn."""

    bos: str = ""
    eos: str = ""
    others: frozenset[str] = frozenset()
