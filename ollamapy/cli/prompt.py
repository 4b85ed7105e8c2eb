"""The REPL's input line, by prompt_toolkit: keys, several lines, history file. Knows nothing of what is typed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.filters import Condition, is_done, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import AfterInput, ConditionalProcessor
from prompt_toolkit.styles import Style

from ollamapy.cli.session import is_open

HISTORY_LINES = 100
MARK, MORE = ">>> ", "... "
EMPTY_HINT, READY_HINT = "Send a message (/? for help)", "Press Enter to send"


class Interrupted(Exception):
    """Ctrl+C. `had_text` says whether it threw something away."""

    def __init__(self, had_text: bool) -> None:
        super().__init__()
        self.had_text = had_text


class LineHistory(History):
    """The last lines typed, in a file of one line each, as Ollama keeps it. Without a file, in memory only."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        super().__init__()
        self._path = path
        self.enabled = enabled

    def append_string(self, string: str) -> None:
        if self.enabled:
            super().append_string(string)

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._lines()) if self.enabled else []

    def store_string(self, string: str) -> None:
        lines = [*self._lines(), *filter(str.strip, string.splitlines())][-HISTORY_LINES:]
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch(mode=0o600)
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(self._path)
        except OSError:  # a read-only home must not end the conversation
            partial.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        try:
            return self._path.read_text(errors="replace").splitlines()[-HISTORY_LINES:]
        except OSError:
            return []


class Prompt:
    def __init__(self, history: LineHistory, editor: str = "") -> None:
        self._editor = editor
        ready = Condition(lambda: self._session.default_buffer.text.endswith("\n") and not self._open())
        hint = AfterInput(FormattedText([("class:placeholder", READY_HINT)]))
        self._session: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            prompt_continuation=MORE,
            placeholder=lambda: [] if is_done() else [("class:placeholder", EMPTY_HINT)],
            input_processors=[ConditionalProcessor(hint, ready & ~is_done)],
            key_bindings=self._keys(),
            enable_suspend=True,
            style=Style.from_dict({"placeholder": "ansibrightblack"}),
        )

    def read(self) -> str:
        """The next input. Raises EOFError at Ctrl+D, Interrupted at Ctrl+C."""
        return self._session.prompt(MARK)

    def _open(self) -> bool:
        return is_open(self._session.default_buffer.text)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter", filter=~is_searching)
        def _(event: KeyPressEvent) -> None:
            if self._open():
                event.current_buffer.newline(copy_margin=False)
            else:
                event.current_buffer.validate_and_handle()

        @keys.add("c-j", filter=~is_searching)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add("c-c", filter=~is_searching)
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=Interrupted(bool(event.current_buffer.text)))

        @keys.add("c-g", filter=~is_searching)
        async def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            edited = await run_in_terminal(lambda: edit(buffer.text, self._editor))
            buffer.text = edited
            buffer.cursor_position = len(edited)

        return keys


def edit(text: str, editor: str) -> str:
    """The text after an external editor: `editor`, else VISUAL, EDITOR or what there is; unchanged if that fails."""
    try:
        edited = click.edit(text, editor=editor or None, extension=".md", require_save=False)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}")
        return text
    return text if edited is None else edited.rstrip("\n")
