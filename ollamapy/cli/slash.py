"""The REPL's slash commands: what they do to the session and what they answer. Text in, text out; no terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ollamapy.api.client import Client
from ollamapy.api.types import ModelRequest, ShowResponse
from ollamapy.cli import show
from ollamapy.cli.listing import listing
from ollamapy.cli.session import Session, parse_think, unquoted
from ollamapy.errors import NotFound, OllamapyError, OptionError
from ollamapy.modelfile import parameter_lines
from ollamapy.names import ModelName

HELP = """Available Commands:
  /set            Change a setting of this session
  /show           Show what the model is
  /load <model>   Switch to another model and start afresh
  /save <model>   Make a model of this session: its settings and messages
  /clear          Forget the messages
  /list           List the models
  /bye            Leave (also /exit)
  /?, /help       This text
  /? set          Settings that /set knows
  /? show         What /show can show
  /? shortcuts    Keys for editing

Begin and end with \"\"\" to write a message of several lines.
"""

HELP_SET = """Available Commands:
  /set parameter ...     Set a parameter of the model: a name and its value
  /set system <text>     Set the system message
  /set history           Remember what is typed
  /set nohistory         Do not remember it
  /set wordwrap          Break lines between words
  /set nowordwrap        Leave lines as they come
  /set format json       Ask for JSON
  /set noformat          Ask for plain text
  /set verbose           Show timings after each answer
  /set quiet             Do not show them
  /set think [level]     Let the model think first: low, medium, high, max
  /set nothink           Do not let it
"""

HELP_SHOW = """Available Commands:
  /show info         Architecture, size, what it can do
  /show license      The licences
  /show modelfile    The Modelfile it could be made from
  /show parameters   Parameters of the model and of this session
  /show system       The system message
  /show template     The prompt template
"""

HELP_SHORTCUTS = """Available keyboard shortcuts:
  Ctrl + a            To the start of the line (Home)
  Ctrl + e            To the end of the line (End)
  Alt + b             One word back
  Alt + f             One word on
  Ctrl + k            Delete to the end of the line
  Ctrl + u            Delete to the start of the line
  Ctrl + w            Delete the word before the cursor
  Ctrl + p, Ctrl + n  The input before, the input after
  Ctrl + j            New line
  Ctrl + g            Edit in an external editor
  Ctrl + l            Clear the screen
  Ctrl + c            Stop the answer
  Ctrl + z            Suspend
  Ctrl + d            Leave (/bye)
"""


class History(Protocol):
    enabled: bool


class Quit(Exception):
    """The user wants to leave."""


class SlashCommands:
    """Carries out lines that begin with a slash. Raises Quit; other errors are answered as text."""

    def __init__(self, client: Client, session: Session, write: Callable[[str], object], history: History) -> None:
        self._client, self._session, self._write, self._history = client, session, write, history
        self._table: dict[str, Callable[[list[str], str], None]] = {
            "/set": self._set,
            "/show": self._show,
            "/load": self._load,
            "/save": self._save,
            "/clear": self._clear,
            "/list": self._list,
            "/?": self._help,
            "/help": self._help,
            "/bye": self._bye,
            "/exit": self._bye,
        }

    @staticmethod
    def is_command(line: str) -> bool:
        """A path of a file that is there is a message, not a command."""
        words = line.split(maxsplit=1)
        return bool(words) and words[0].startswith("/") and not _is_file(words[0])

    def run(self, line: str) -> None:
        words = line.split()
        command = self._table.get(words[0])
        if command is None:
            self._say(f"Unknown command '{words[0]}'. Type /? for help")
            return
        try:
            command(words[1:], line)
        except OllamapyError as error:
            self._say(f"error: {error}")

    def _say(self, text: str) -> None:
        self._write(f"{text}\n")

    def _bye(self, words: list[str], line: str) -> None:
        raise Quit

    def _clear(self, words: list[str], line: str) -> None:
        self._session.clear()
        self._say("Cleared session context")

    def _list(self, words: list[str], line: str) -> None:
        self._say(listing(self._client.tags(), *words[:1]))

    def _help(self, words: list[str], line: str) -> None:
        topic = words[0].removeprefix("/") if words else ""
        known = {"set": HELP_SET, "show": HELP_SHOW, "shortcut": HELP_SHORTCUTS, "shortcuts": HELP_SHORTCUTS}
        self._say(known.get(topic, HELP))

    def _load(self, words: list[str], line: str) -> None:
        if len(words) != 1:
            self._say("Usage:\n  /load <modelname>")
            return
        self._say(f"Loading model '{words[0]}'")
        try:
            info = self._client.show(ModelRequest(model=words[0]))
            self._client.load(words[0], self._session.keep_alive)
        except NotFound:
            self._say(f"Couldn't find model '{words[0]}'")
            return
        self._session.switch(words[0], info)

    def _save(self, words: list[str], line: str) -> None:
        if len(words) != 1:
            self._say("Usage:\n  /save <modelname>")
            return
        if not ModelName.is_valid(words[0]):
            self._say(f"error: The model name '{words[0]}' is invalid")
            return
        stored = self._client.show(ModelRequest(model=self._session.model)).messages
        for _ in self._client.create(self._session.create_request(words[0], stored)):
            pass
        self._say(f"Created new model '{words[0]}'")

    def _set(self, words: list[str], line: str) -> None:
        if not words:
            self._say(HELP_SET)
            return
        name, values = words[0], words[1:]
        session = self._session
        match name:
            case "history" | "nohistory":
                self._history.enabled = name == "history"
            case "wordwrap" | "nowordwrap":
                session.word_wrap = name == "wordwrap"
                self._say(f"Set '{name}' mode.")
            case "verbose" | "quiet":
                session.verbose = name == "verbose"
                self._say(f"Set '{name}' mode.")
            case "format" if values == ["json"]:
                session.format = "json"
                self._say("Set format to 'json' mode.")
            case "format":
                self._say("Invalid or missing format. For 'json' mode use '/set format json'")
            case "noformat":
                session.format = None
                self._say("Disabled format.")
            case "think" | "nothink":
                self._set_think(name, values)
            case "parameter":
                self._set_parameter(values)
            case "system":
                self._set_system(line)
            case _:
                self._say(f"Unknown command '/set {name}'. Type /? for help")

    def _set_think(self, name: str, values: list[str]) -> None:
        think = parse_think(values[0] if values else "") if name == "think" else False
        if think and "thinking" not in self._client.show(ModelRequest(model=self._session.model)).capabilities:
            self._say(f'warning: model "{self._session.model}" does not support thinking output')
        self._session.think = think
        self._say(f"Set 'think' mode to '{think}'." if isinstance(think, str) else f"Set '{name}' mode.")

    def _set_parameter(self, values: list[str]) -> None:
        if len(values) < 2:
            self._say("Usage:\n  /set parameter <name> <value>\n")
            self._say("\n".join(_option_help()))
            return
        try:
            self._session.set_parameter(values[0], values[1:])
        except OptionError as error:
            self._say(f"Couldn't set parameter: {error}")
            return
        self._say(f"Set parameter '{values[0]}' to '{', '.join(values[1:])}'")

    def _set_system(self, line: str) -> None:
        text = unquoted(line.split(maxsplit=2)[2]) if len(line.split()) > 2 else ""
        if not text:
            self._say("Usage:\n  /set system <message>")
            return
        self._session.system = text
        self._say("Set system message.")

    def _show(self, words: list[str], line: str) -> None:
        if not words:
            self._say(HELP_SHOW)
            return
        info = self._client.show(self._session.show_request())
        match words[0]:
            case "info":
                self._write(show.summary(info))
            case "license":
                self._say(info.license or "No license was specified for this model.")
            case "modelfile":
                self._say(info.modelfile)
            case "parameters":
                self._show_parameters(info)
            case "system":
                self._say(f"{info.system}\n" if info.system else "No system message was specified for this model.")
            case "template":
                self._say(info.template or "No prompt template was specified for this model.")
            case other:
                self._say(f"Unknown command '/show {other}'. Type /? for help")

    def _show_parameters(self, info: ShowResponse) -> None:
        lines = info.parameters.splitlines() or ["No additional parameters were specified for this model."]
        self._say("\n".join(["Model defined parameters:", *(f"  {line}" for line in lines), ""]))
        if self._session.options:
            own = [f"  {name:<30} {value}" for name, value in parameter_lines(self._session.options)]
            self._say("\n".join(["User defined parameters:", *own, ""]))


def _is_file(word: str) -> bool:
    try:
        return Path(word.replace("\\", "")).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _option_help() -> list[str]:
    from ollamapy.api.options import OPTIONS

    kinds = {"strings": "string ...", "speculation": "string"}
    return [f"  {name} <{kinds.get(o.kind, o.kind)}>".ljust(32) + o.help for name, o in OPTIONS.items()]
