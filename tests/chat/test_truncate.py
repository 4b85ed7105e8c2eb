"""Dropping old messages and cutting long prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from ollamapy.api.messages import Message
from ollamapy.chat.truncate import prompt_limit, truncate_messages, truncate_tokens
from ollamapy.errors import TemplateError


def _render(messages: Sequence[Message]) -> str:
    return "".join(f"<{message.role}>{message.content}" for message in messages)


def _chat(length: int) -> list[Message]:
    return [Message(("user", "assistant")[turn % 2], "x" * (turn * 7 % 13)) for turn in range(length)]


def _one_by_one(messages: list[Message], limit: int) -> list[Message]:
    """The rule as it is stated: drop one after the other."""
    for start in range(len(messages)):
        kept = [message for message in messages[:start] if message.role == "system"] + messages[start:]
        if len(_render(kept)) <= limit:
            return kept
    return kept


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 31])
@pytest.mark.parametrize("limit", [0, 1, 10, 20, 55, 100, 200, 10_000])
def test_as_few_as_needed_are_dropped(length: int, limit: int) -> None:
    messages = _chat(length)
    for place in (2, 5):
        if place < length:
            messages[place] = Message("system", "rules")
    kept, dropped = truncate_messages(messages, _render, len, limit)
    assert kept == (_one_by_one(messages, limit) if messages else [])
    assert dropped == length - len(kept)


def test_few_renderings() -> None:
    calls = 0

    def render(messages: Sequence[Message]) -> str:
        nonlocal calls
        calls += 1
        return _render(messages)

    kept, dropped = truncate_messages(_chat(1000), render, len, 300)
    assert dropped == 1000 - len(kept) > 900
    assert calls <= math.log2(1000) + 2


def test_cuts_at_which_the_template_refuses_are_passed_over() -> None:
    def render(messages: Sequence[Message]) -> str:
        if messages[0].role != "user":
            raise TemplateError("roles must alternate")
        return _render(messages)

    messages = _chat(21)
    for limit in range(0, 300, 7):
        kept, _ = truncate_messages(messages, render, len, limit)
        assert kept[0].role == "user"
        fitting = [start for start in range(0, 21, 2) if len(_render(messages[start:])) <= limit]
        assert kept == messages[min(fitting, default=20) :]


def test_the_templates_own_error_is_raised() -> None:
    def render(messages: Sequence[Message]) -> str:
        raise TemplateError("no")

    with pytest.raises(TemplateError):
        truncate_messages(_chat(3), render, len, 10)


def test_long_prompts_lose_their_middle() -> None:
    ids = list(range(100))
    assert truncate_tokens(ids, 101, 4) == (ids, 0)
    kept, cut = truncate_tokens(ids, 100, 4)
    assert prompt_limit(100, 4) == 52
    assert (kept, cut) == ([0, 1, 2, 3, *range(52, 100)], 48)
    assert truncate_tokens(ids, 100, 4, add_bos=True)[0][:6] == [0, 1, 2, 3, 4, 52]
    assert truncate_tokens(ids, 50, -1) == ([*range(49)], 51)
    assert truncate_tokens(ids, 50, 1000) == ([*range(49)], 51)
    assert truncate_tokens(ids, 4, 0) == ([98, 99], 98)


@pytest.mark.parametrize("num_ctx", [2, 3, 4, 17, 64])
@pytest.mark.parametrize("num_keep", [-1, 0, 1, 4, 63, 1000])
def test_a_cut_prompt_leaves_room(num_ctx: int, num_keep: int) -> None:
    for length in (num_ctx - 1, num_ctx, num_ctx + 1, 500):
        kept, cut = truncate_tokens(list(range(length)), num_ctx, num_keep)
        assert len(kept) < num_ctx and len(kept) + cut == length
        assert kept == sorted(set(kept))
        assert kept[-1:] == [length - 1] or num_keep < 0 or num_keep >= num_ctx - 1
