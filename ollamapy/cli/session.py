"""The state of a conversation and the requests it makes. No terminal, no HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ollamapy.api import options
from ollamapy.api.messages import Message
from ollamapy.api.types import THINK_LEVELS, ChatRequest, CreateRequest, GenerateRequest, ModelRequest, ShowResponse
from ollamapy.errors import BadRequest

QUOTES = '"""'
_QUOTED = re.compile(rf"\s*(?:/set\s+system\s+)?{QUOTES}")


@dataclass
class Session:
    """`messages` are those since the start or /clear; the model's own stored ones are the server's to add."""

    model: str
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    format: Any = None
    think: bool | str | None = None
    keep_alive: str | None = None
    word_wrap: bool = True
    verbose: bool = False
    hide_thinking: bool = False
    messages: list[Message] = field(default_factory=list)

    def chat_request(self) -> ChatRequest:
        system = [Message(role="system", content=self.system)] if self.system else []
        return ChatRequest(messages=system + self.messages, **self._common())

    def generate_request(self, prompt: str) -> GenerateRequest:
        return GenerateRequest(prompt=prompt, system=self.system, **self._common())

    def create_request(self, name: str, stored: list[Message]) -> CreateRequest:
        """Makes a model of this conversation; `stored` are the messages its model begins with."""
        parameters = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()}
        messages = [*stored, *self.messages] if self.messages else []
        return CreateRequest(model=name, base=self.model, system=self.system, parameters=parameters, messages=messages)

    def show_request(self) -> ModelRequest:
        return ModelRequest(model=self.model, system=self.system, options=self.options)

    def say(self, text: str) -> None:
        self.messages.append(Message(role="user", content=text))

    def answered(self, content: str, thinking: str) -> None:
        """Keeps an answer, also one that was stopped; without any text the question stands alone."""
        if content or thinking:
            self.messages.append(Message(role="assistant", content=content, thinking=thinking))

    def take_back(self) -> None:
        """Forgets the last message: its answer failed, and sending it again with the next one would fail again."""
        self.messages.pop()

    def clear(self) -> None:
        self.messages.clear()

    def switch(self, model: str, info: ShowResponse) -> None:
        self.model = model
        self.clear()
        self.think_as(info)

    def think_as(self, info: ShowResponse) -> None:
        """Thinking is on where the model can, unless the user has set it."""
        if "thinking" not in info.capabilities:
            self.think = None
        elif self.think is None:
            self.think = True

    def set_parameter(self, name: str, values: list[str]) -> None:
        """Raises OptionError."""
        self.options[name] = options.parse_text(name, values)

    def _common(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "format": self.format,
            "options": self.options,
            "keep_alive": self.keep_alive,
            "think": self.think,
        }


def parse_think(text: str) -> bool | str:
    """The value of --think and /set think. Raises BadRequest."""
    if text in ("", "true"):
        return True
    if text == "false":
        return False
    if text not in THINK_LEVELS:
        raise BadRequest(f'invalid value for --think: "{text}" (must be true, false, high, medium, low, or max)')
    return text


def is_open(text: str) -> bool:
    """Whether the input goes on after its line's end: it began with triple quotes, and they are not closed."""
    opening = _QUOTED.match(text)
    return opening is not None and not text[opening.end() :].rstrip().endswith(QUOTES)


def unquoted(text: str) -> str:
    """The text between triple quotes, or the text itself."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
