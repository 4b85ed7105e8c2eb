"""Shows an answer while it comes: thinking set apart, words wrapped, timings. Knows nothing of where it comes from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TextIO

from ollamapy.api.types import ChatResponse, GenerateResponse, Reply
from ollamapy.cli.text import go_duration
from ollamapy.cli.wrap import Wrapper

MARGIN = 5  # columns left free at the right edge
_GREY, _BOLD_GREY, _PLAIN = "\x1b[38;5;245m", "\x1b[38;5;245m\x1b[1m", "\x1b[0m"
# A model's text must not move the cursor, rename the window or write to the clipboard.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class AnswerView:
    """Writes pieces of one answer to `out`. Only a terminal gets colours, wrapped lines and text without control codes."""

    def __init__(self, out: TextIO, *, word_wrap: bool, hide_thinking: bool) -> None:
        self._out, self._hide_thinking = out, hide_thinking
        self._terminal = out.isatty()
        width = shutil.get_terminal_size().columns - MARGIN if word_wrap and self._terminal else 0
        self._wrapper = Wrapper(out.write, width)
        self._thinking = ""  # all that was shown of it so far
        self.content = ""
        self.thinking = ""

    def feed(self, content: str, thinking: str) -> None:
        self.thinking += thinking
        self.content += content
        if thinking and not self._hide_thinking:
            if not self._thinking:
                self._out.write(self._marked("Thinking...\n", after=_GREY))
            self._thinking += thinking
            self._wrapper.feed(self._shown(thinking))
        if content:
            self._end_thinking()
            self._wrapper.feed(self._shown(content))
        self._out.flush()

    def end(self) -> None:
        """Leaves an empty line behind the answer, however far it came."""
        self._end_thinking()
        if self.content or self.thinking:
            self._out.write("\n\n")
            self._out.flush()

    def _end_thinking(self) -> None:
        if self._thinking:
            if not self._thinking.endswith("\n"):
                self._wrapper.feed("\n")
            self._out.write(self._marked("...done thinking.\n\n", after=_PLAIN))
            self._thinking = ""

    def _marked(self, text: str, *, after: str) -> str:
        return f"{_BOLD_GREY}{text}{_PLAIN}{after}" if self._terminal else text

    def _shown(self, text: str) -> str:
        return text.translate(_CONTROLS) if self._terminal else text


def show_answer(stream: Generator[GenerateResponse] | Generator[ChatResponse], view: AnswerView, *, verbose: bool) -> None:
    """Shows an answer to its end, and what there is to say of it on stderr. What stops it goes through, the stream closed."""
    last: GenerateResponse | ChatResponse | None = None
    try:
        with closing(stream):
            with waiting():
                reply = next(stream, None)
                while reply is not None and not reply.done and not any(_pieces(reply)):  # it says only that it is alive
                    reply = next(stream, None)
            while reply is not None:
                view.feed(*_pieces(reply))
                last, reply = reply, next(stream, None)
    finally:
        view.end()
    if last is not None:
        report = notice(last) + (timings(last) if verbose else "")
        print(report, end="", file=sys.stderr, flush=True)


def _pieces(reply: GenerateResponse | ChatResponse) -> tuple[str, str]:
    """Content and thinking."""
    if isinstance(reply, ChatResponse):
        return reply.message.content, reply.message.thinking
    return reply.response, reply.thinking


def timings(reply: Reply) -> str:
    """The lines of --verbose, from the last line of an answer."""
    rows: list[tuple[str, str]] = []
    if reply.total_duration:
        rows.append(("total duration:", go_duration(reply.total_duration)))
    if reply.load_duration:
        rows.append(("load duration:", go_duration(reply.load_duration)))
    for name, count, duration in (
        ("prompt eval", reply.prompt_eval_count, reply.prompt_eval_duration),
        ("eval", reply.eval_count, reply.eval_duration),
    ):
        if count:
            rows.append((f"{name} count:", f"{count} token(s)"))
        if duration:
            rows.append((f"{name} duration:", go_duration(duration)))
            rows.append((f"{name} rate:", f"{count / duration * 1e9:.2f} tokens/s"))
    if reply.draft_count:
        share = 100 * reply.draft_accepted_count / reply.draft_count
        rows.append(("draft accepted:", f"{reply.draft_accepted_count} of {reply.draft_count} token(s), {share:.0f}%"))
    return "".join(f"{name:<21} {value}\n" for name, value in rows)


def notice(reply: Reply) -> str:
    """What the user should know of how the answer was made; "" when there is nothing."""
    if not reply.truncated:
        return ""
    before, after = reply.prompt_tokens_total, reply.prompt_eval_count
    return f"warning: the prompt was cut from {before} to {after} tokens to fit the context\n"


@contextmanager
def waiting() -> Iterator[None]:
    """A spinner on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(""):
        yield
