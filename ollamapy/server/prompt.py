"""From messages or a text to the token ids that an engine gets, cut to the context where the request allows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ollamapy.api.messages import Message, Tool
from ollamapy.chat.format import ChatFormat, Think
from ollamapy.chat.truncate import truncate_messages, truncate_tokens
from ollamapy.errors import BadRequest, ContextOverflow
from ollamapy.store.library import LocalModel
from ollamapy.tokenizer import Tokenizer

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Prompt(NamedTuple):
    """`total` counts the tokens before any were cut."""

    text: str
    ids: list[int]
    total: int

    @property
    def num_cut(self) -> int:
        return self.total - len(self.ids)


class Room(NamedTuple):
    """What a prompt may take: its ids and one generated token must fit `num_ctx`.

    `truncate`: the oldest messages may be dropped; `shift` besides it: the middle of a text may be cut.
    """

    num_ctx: int
    num_keep: int
    truncate: bool
    shift: bool


def chat_prompt(
    messages: Sequence[Message],
    chat: ChatFormat,
    think: Think,
    tokenizer: Tokenizer,
    room: Room,
    before: str = "",
    tools: Sequence[Tool] = (),
) -> Prompt:
    """Renders and encodes; `before` is text of an earlier exchange. Raises TemplateError, ContextOverflow."""

    def render(kept: Sequence[Message]) -> str:
        return before + chat.render(kept, tools=tools, think=think)

    text = render(messages)
    ids = tokenizer.encode(text, add_special=True)
    total = len(ids)
    if total >= room.num_ctx and room.truncate and len(messages) > 1:
        kept, dropped = truncate_messages(messages, render, counting(tokenizer), room.num_ctx - 1)
        if dropped:
            text = render(kept)
            ids = tokenizer.encode(text, add_special=True)
    return _cut(text, ids, total, tokenizer, room)


def text_prompt(text: str, tokenizer: Tokenizer, room: Room) -> Prompt:
    """Encodes a text as it stands. Raises ContextOverflow."""
    ids = tokenizer.encode(text, add_special=True)
    return _cut(text, ids, len(ids), tokenizer, room)


def ids_prompt(ids: list[int], tokenizer: Tokenizer, room: Room) -> Prompt:
    """Token ids as they stand. Raises BadRequest, ContextOverflow."""
    if beyond := [id for id in ids if not 0 <= id < tokenizer.vocab_size]:
        raise BadRequest(f"prompt: token {beyond[0]} is not in the vocabulary of {tokenizer.vocab_size}")
    return _cut(tokenizer.decode(ids, skip_special=False), ids, len(ids), tokenizer, room)


def counting(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text, add_special=True))


def _cut(text: str, ids: list[int], total: int, tokenizer: Tokenizer, room: Room) -> Prompt:
    if len(ids) >= room.num_ctx:
        if not (room.truncate and room.shift):
            raise ContextOverflow(total, room.num_ctx)
        ids, _ = truncate_tokens(ids, room.num_ctx, room.num_keep, tokenizer.add_bos)
    return Prompt(text, ids, total)


def conversation(model: LocalModel, messages: Sequence[Message]) -> list[Message]:
    """The model's own messages and then the request's; the model's SYSTEM first unless the request begins with one."""
    turns = [*model.messages, *messages]
    if model.system and messages[0].role != "system":
        turns.insert(0, Message(role="system", content=model.system))
    if model.config.model_family == "qwen3" or model.name.model.lower() == "deepseek-r1":
        return _without_old_thoughts(turns)
    return turns


def _without_old_thoughts(turns: list[Message]) -> list[Message]:
    """These models are not to see what they thought before the user's last turn."""
    last_user = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=0)
    return [
        Message(role=turn.role, content=_THOUGHT.sub("", turn.content or "", count=1), tool_calls=turn.tool_calls)
        if turn.role == "assistant" and at < last_user
        else turn
        for at, turn in enumerate(turns)
    ]
