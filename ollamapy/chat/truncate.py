"""Making a prompt fit the context: whole messages from the oldest on, or the middle of one long prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ollamapy.api.messages import Message
from ollamapy.errors import TemplateError

Render = Callable[[Sequence[Message]], str]


def truncate_messages(
    messages: Sequence[Message], render: Render, count_tokens: Callable[[str], int], limit: int
) -> tuple[list[Message], int]:
    """The messages kept, and how many were dropped: the oldest, until what `render` makes has at most `limit` tokens.

    System messages and the last message are always kept, so the result may still be too long. The cut is found by bisection,
    as rendering at every place costs quadratic time; a cut at which the template refuses to render (turns that must alternate)
    is passed over.
    """

    def kept(start: int) -> list[Message]:
        return [message for message in messages[:start] if message.role == "system"] + list(messages[start:])

    def size(chosen: Sequence[Message]) -> int:
        return count_tokens(render(chosen))

    if len(messages) < 2 or size(messages) <= limit:
        return list(messages), 0
    best = high = len(messages) - 1
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        start, tokens = _first_rendering(lambda start: size(kept(start)), middle, high)
        if tokens is not None and tokens > limit:
            low = start
            continue
        if tokens is not None:
            best = start
        high = middle
    result = kept(best)
    return result, len(messages) - len(result)


def _first_rendering(size: Callable[[int], int], start: int, stop: int) -> tuple[int, int | None]:
    """The first cut in [start, stop) that renders, and its number of tokens; None when there is none."""
    for cut in range(start, stop):
        try:
            return cut, size(cut)
        except TemplateError:
            continue
    return stop, None


def prompt_limit(num_ctx: int, num_keep: int) -> int:
    """Tokens left of a prompt that is too long: the head of `num_keep` and a tail that leaves half of the rest free."""
    return num_ctx - max((num_ctx - num_keep) // 2, 1)


def truncate_tokens(ids: Sequence[int], num_ctx: int, num_keep: int, add_bos: bool = False) -> tuple[list[int], int]:
    """`ids` cut in the middle when they do not leave room for one token in `num_ctx`, and how many were cut.

    `num_keep` head tokens stay (all that fit when negative), one more when the tokenizer adds a BOS.
    """
    most = num_ctx - 1
    if num_ctx <= 1 or len(ids) <= most:
        return list(ids), 0
    keep = min((len(ids) if num_keep < 0 else num_keep) + add_bos, most)
    cut = len(ids) - prompt_limit(num_ctx, keep)
    return [*ids[:keep], *ids[keep + cut :]], cut
