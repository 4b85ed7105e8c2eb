"""The REPL on a pseudo-terminal, against a real daemon."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import ANSWER
from tests.cli.terminal import EDITOR, END, ENTER, INTERRUPT, NEWLINE, PASTE, Terminal
from tests.daemon import COMMAND, ROOT, Daemon


@contextmanager
def repl(daemon: Daemon, home: Path, *args: str, **variables: str) -> Iterator[Terminal]:
    """A session with a history file of its own, at its first prompt."""
    environment = {**daemon.environment, "HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", **variables}
    with Terminal([*COMMAND, "run", *args], environment, ROOT) as terminal:
        terminal.prompt()
        yield terminal


def messages(daemon: Daemon, model: str) -> list[tuple[str, str | None]]:
    """Role and text of the messages that a saved model has."""
    from ollamapy.api.types import ModelRequest

    with daemon.client() as client:
        return [(m.role, m.content) for m in client.show(ModelRequest(model=model)).messages]


def test_a_conversation(daemon: Daemon, tmp_path: Path) -> None:
    """Answers, a message of several lines, what is kept of it, and leaving by /bye."""
    with repl(daemon, tmp_path, "speaker") as terminal:
        terminal.line("hi")
        assert ANSWER.strip() in terminal.prompt()
        terminal.line('"""one')
        terminal.wait("...")
        terminal.line("  two")
        terminal.line('three"""')
        assert ANSWER.strip() in terminal.prompt()
        terminal.send("by" + NEWLINE + "newline" + ENTER)
        assert ANSWER.strip() in terminal.prompt()
        terminal.line("/save conversation")
        assert "Created new model 'conversation'" in terminal.prompt()
        terminal.line("/clear")
        assert "Cleared session context" in terminal.prompt()
        terminal.line("/bye")
        assert terminal.ended() == 0
    said = [("user", "hi"), ("user", "one\n  two\nthree"), ("user", "by\nnewline")]
    assert messages(daemon, "conversation") == [turn for user in said for turn in (user, ("assistant", ANSWER))]
    daemon.ok("rm", "conversation")
    lines = (tmp_path / ".ollama" / "history").read_text().splitlines()
    assert lines == ["hi", '"""one', "  two", 'three"""', "by", "newline", "/save conversation", "/clear", "/bye"]
    assert (tmp_path / ".ollama" / "history").stat().st_mode & 0o777 == 0o600


def test_settings(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "speaker") as terminal:

        def said(line: str) -> str:
            terminal.line(line)
            return terminal.prompt()

        assert "Set parameter 'num_predict' to '2'" in said("/set parameter num_predict 2")
        assert "Couldn't set parameter: invalid float value [warm]" in said("/set parameter temperature warm")
        assert "Usage:\n  /set parameter <name> <value>" in said("/set parameter")
        answer = said("hi")
        assert "Hello there" in answer and "how" not in answer
        assert "Set system message." in said('/set system """Be\rbrief."""')
        assert "Be\nbrief." in said("/show system")
        shown = said("/show parameters")
        assert 'stop                           "nothing"' in shown and "num_predict                    2" in shown
        assert "Set 'verbose' mode." in said("/set verbose")
        assert "eval count:           2 token(s)" in said("hi")
        assert "Set 'quiet' mode." in said("/set quiet")
        assert "eval count" not in said("hi")
        assert "Set format to 'json' mode." in said("/set format json")
        assert "{" in said("hi") and "Disabled format." in said("/set noformat")
        assert "Invalid or missing format." in said("/set format")
        assert "Set 'nowordwrap' mode." in said("/set nowordwrap")
        assert "does not support thinking output" in said("/set think")
        assert "Set 'nothink' mode." in said("/set nothink")
        assert "Unknown command '/set x'. Type /? for help" in said("/set x")
        saved = said("/save terse")
        assert "Created new model 'terse'" in saved
        assert "error: The model name '/bad' is invalid" in said("/save /bad")
        terminal.send(END)
        assert terminal.ended() == 0
    assert daemon.ok("show", "--system", "terse") == "Be\nbrief.\n"
    assert "num_predict" in daemon.ok("show", "--parameters", "terse")
    roles = [role for role, _ in messages(daemon, "terse")]
    assert roles == ["user", "assistant"] * 4
    daemon.ok("rm", "terse")


def test_showing_listing_and_loading(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "speaker") as terminal:

        def said(line: str) -> str:
            terminal.line(line)
            return terminal.prompt()

        assert "  Model\n    architecture        llama\n" in said("/show info")
        assert "Free." in said("/show license") and "FROM " in said("/show modelfile")
        assert "Be kind." in said("/show system")
        assert "No prompt template was specified for this model." in said("/show template")
        assert "Unknown command '/show x'" in said("/show x")
        assert "/show parameters" in said("/show") and "/set nothink" in said("/? set") and "Ctrl + g" in said("/? shortcuts")
        listed = said("/list thi")
        assert "NAME" in listed and "thinker:latest" in listed and "speaker" not in listed
        assert "Couldn't find model 'nobody'" in said("/load nobody")
        assert ANSWER.strip() in said("hi")
        assert "Loading model 'thinker'" in said("/load thinker")
        answer = said("hi")
        assert "Thinking...\nLet me see\n...done thinking.\n\nYes." in answer
        assert "Unknown command '/nonsense'. Type /? for help" in said("/nonsense")
        assert "Thinking..." in said(f"{COMMAND[0]} is a file, this a message")
        terminal.line("/exit")
        assert terminal.ended() == 0


def test_stored_messages_are_shown(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "thinker") as terminal:
        assert ">>> Ready?\nAlways.\n\n" in terminal.text


def test_interrupts(daemon: Daemon, tmp_path: Path) -> None:
    """Ctrl+C stops an answer, which is kept; throws a line away; and at an empty line says how to leave."""
    with repl(daemon, tmp_path, "endless") as terminal:
        terminal.line("count")
        terminal.wait("eleven twelve zero one")
        terminal.send(INTERRUPT)
        terminal.prompt()
        terminal.send("never sent")
        terminal.wait("never sent")
        terminal.send(INTERRUPT)
        assert "Use Ctrl + d" not in terminal.prompt()
        terminal.send(INTERRUPT)
        assert "Use Ctrl + d or /bye to exit." in terminal.prompt()
        terminal.line("/save counted")
        terminal.prompt()
        terminal.send(END)
        assert terminal.ended() == 0
    kept = messages(daemon, "counted")
    assert kept[0] == ("user", "count") and kept[1][0] == "assistant" and len(kept) == 2
    assert (kept[1][1] or "").startswith(" zero one two")
    with daemon.client() as client:
        stats = next(model for model in client.ps(verbose=True).models if model.name == "endless:latest").engine["stats"]
    assert stats["num_running"] == 0 and stats["used_blocks"] == 0
    daemon.ok("rm", "counted")  # ends the engine, too: it has the same weights


def test_what_is_typed_during_an_answer_waits_for_the_prompt(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "endless") as terminal:
        terminal.line("/set parameter num_predict 300")
        terminal.prompt()
        terminal.line("count")
        terminal.wait("zero one")
        terminal.send("typed ahead" + ENTER)
        answer = terminal.wait("typed ahead")
        assert ">>> " in answer and answer.count("zero") > 10, "it does not stand in the answer"
        terminal.wait("zero one")
        terminal.prompt()


def test_a_terminal_that_tells_where_its_cursor_is(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "speaker", PROMPT_TOOLKIT_NO_CPR="") as terminal:
        terminal.line("hi")
        terminal.wait(ANSWER.strip())
        terminal.prompt()
        terminal.send(END)
        assert terminal.ended() == 0
    assert "cursor position requests" not in terminal.text


def test_lines_are_wrapped_at_words(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "endless") as terminal:
        terminal.line("/set parameter num_predict 60")
        terminal.prompt()
        terminal.line("count")
        answer = terminal.prompt()
        terminal.line("/set nowordwrap")
        terminal.prompt()
        terminal.line("/clear")
        terminal.prompt()
        terminal.line("count")
        plain = terminal.prompt()
    assert "zero" in plain and max(len(line) for line in plain.splitlines()) > 200
    assert answer.count("\n") > plain.count("\n")


def test_history_is_shared_with_the_next_session(daemon: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / ".ollama"
    folder.mkdir()
    (folder / "history").write_text("".join(f"old {number}\n" for number in range(100)))
    with repl(daemon, tmp_path, "speaker") as terminal:
        terminal.line("/set nohistory")
        terminal.prompt()
        terminal.line("/clear")
        terminal.prompt()
        terminal.line("/set history")
        terminal.prompt()
        terminal.send("\x1b[A\x1b[A\x1b[A" + ENTER)  # /set history is not kept, /set nohistory is
        terminal.wait("old 98")
        terminal.prompt()
    lines = (folder / "history").read_text().splitlines()
    assert len(lines) == 100 and lines[-3:] == ["old 99", "/set nohistory", "old 98"]
    with repl(daemon, tmp_path, "speaker", OLLAMA_NOHISTORY="1") as terminal:
        terminal.line("secret")
        terminal.prompt()
    assert "secret" not in (folder / "history").read_text()


def test_pasted_lines_wait_for_enter(daemon: Daemon, tmp_path: Path) -> None:
    with repl(daemon, tmp_path, "speaker") as terminal:
        terminal.send("first\nsecond\n".join(PASTE))
        terminal.wait("Press Enter to send")
        terminal.send(ENTER)
        assert terminal.prompt().count(ANSWER.strip()) == 1


def test_an_external_editor(daemon: Daemon, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\ngrep -q draft "$1" && printf "/show system\\n" > "$1"\n')
    editor.chmod(0o755)
    with repl(daemon, tmp_path, "speaker", OLLAMA_EDITOR=str(editor)) as terminal:
        terminal.send("draft" + EDITOR)
        terminal.wait("system")
        terminal.send(ENTER)
        assert "Be kind." in terminal.prompt()


def test_a_server_that_goes_away_does_not_end_the_session(daemon: Daemon, tmp_path: Path) -> None:
    """Its engine, here: the answer ends with the error, the next one works."""
    with repl(daemon, tmp_path, "endless") as terminal, daemon.client() as client:
        terminal.line("count")
        terminal.wait("eleven twelve zero one")
        engine = next(model for model in client.ps(verbose=True).models if model.name == "endless:latest").engine
        os.kill(engine["pid"], signal.SIGKILL)
        terminal.wait("error: ")
        terminal.prompt()
        terminal.line("/set parameter num_predict 3")
        terminal.prompt()
        terminal.line("again")
        assert "zero one two" in terminal.prompt()


@pytest.mark.parametrize("args", [["create", "bars", "-f", "Modelfile"], ["run", "speaker", "hi"]])
def test_other_commands_on_a_terminal(daemon: Daemon, tmp_path: Path, speaker_gguf: Path, args: list[str]) -> None:
    """Bars and spinners are drawn and gone, the result stays."""
    (tmp_path / "Modelfile").write_text(f"FROM {speaker_gguf}\nSYSTEM {tmp_path}\n")
    with Terminal([*COMMAND, *args], daemon.environment, tmp_path) as terminal:
        terminal.wait("success" if args[0] == "create" else ANSWER.strip())
        assert terminal.ended() == 0
    if args[0] == "create":
        assert b"\x1b[" in terminal.raw and "100%" in terminal.text
        assert re.search(r"using existing layer sha256:[0-9a-f]{12}\s", terminal.text), "a whole digest leaves no room for bars"
        daemon.ok("rm", "bars")
