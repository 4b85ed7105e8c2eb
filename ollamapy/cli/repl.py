"""The conversation at the terminal: reads, sends, shows, until the user leaves."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ollamapy.api.client import Client
from ollamapy.api.types import ShowResponse
from ollamapy.cli.answer import AnswerView, show_answer, waiting
from ollamapy.cli.prompt import MARK, Interrupted, LineHistory, Prompt
from ollamapy.cli.session import Session, unquoted
from ollamapy.cli.slash import Quit, SlashCommands
from ollamapy.env import Settings
from ollamapy.errors import OllamapyError


class Repl:
    def __init__(self, client: Client, settings: Settings, session: Session) -> None:
        history = LineHistory(settings.home / ".ollama" / "history", enabled=not settings.nohistory)
        self._client, self._session = client, session
        self._prompt = Prompt(history, settings.editor)
        self._commands = SlashCommands(client, session, self._write, history)

    def run(self, info: ShowResponse) -> None:
        """Returns when the user leaves. The model's stored messages are shown first."""
        self._replay(info)
        while True:
            try:
                line = self._prompt.read()
            except EOFError:
                return
            except Interrupted as stopped:
                if not stopped.had_text:
                    self._write("\nUse Ctrl + d or /bye to exit.\n")
                continue
            try:
                self._take(line)
            except Quit:
                return

    def _take(self, line: str) -> None:
        if SlashCommands.is_command(line):
            with waiting() if line.startswith(("/load", "/save")) else nullcontext():
                self._commands.run(line.strip())
            return
        text = unquoted(line)
        if text.strip():
            self._ask(text)

    def _ask(self, text: str) -> None:
        """An answer that Ctrl+C stops is kept as far as it came; a question without any answer is taken back."""
        session = self._session
        session.say(text)
        view = AnswerView(sys.stdout, word_wrap=session.word_wrap, hide_thinking=session.hide_thinking)
        try:
            with _typing_ahead():
                show_answer(self._client.chat(session.chat_request()), view, verbose=session.verbose)
        except KeyboardInterrupt:
            pass
        except OllamapyError as error:
            self._write(f"error: {error}\n\n")
        if view.content or view.thinking:
            session.answered(view.content, view.thinking)
        else:
            session.take_back()

    def _replay(self, info: ShowResponse) -> None:
        for message in info.messages:
            if message.role == "user":
                self._write(f"{MARK}{message.content}\n")
            elif message.role == "assistant":
                view = AnswerView(sys.stdout, word_wrap=self._session.word_wrap, hide_thinking=False)
                view.feed(message.content or "", "")
                view.end()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _typing_ahead() -> Iterator[None]:
    """Keys typed while an answer is shown do not appear in it, and wait for the prompt; Ctrl+C still interrupts."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter for the prompt, to which a newline is Ctrl+J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(fd, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
