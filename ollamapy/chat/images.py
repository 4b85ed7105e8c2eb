"""Where images stand in a prompt: `[img-N]` marks in the messages' text, counted over the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

from ollamapy.api.messages import Message


def marked_contents(messages: Sequence[Message]) -> list[str]:
    """Each message's text with a mark per image: in place of the text's own `[img]`, else in front of it."""
    contents = []
    number = 0
    for message in messages:
        content, prefix = message.content or "", ""
        for _ in message.images or ():
            mark = f"[img-{number}]"
            number += 1
            if "[img]" in content:
                content = content.replace("[img]", mark, 1)
            else:
                prefix += mark
        contents.append(prefix + content)
    return contents
