"""`ollamapy run` without a terminal, as a real process against a real daemon."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import pytest

from tests.cli.conftest import ANSWER
from tests.cli.test_commands import rows
from tests.daemon import COMMAND, ROOT, Daemon


def prompt_tokens(daemon: Daemon, *words: str, input: str = "") -> int:
    done = daemon.cli("run", "speaker", "--verbose", *words, input=input)
    assert done.stdout == f"{ANSWER}\n\n", done.stderr
    found = re.search(r"prompt eval count: +(\d+) token", done.stderr)
    assert found
    return int(found[1])


def test_one_shot(daemon: Daemon) -> None:
    done = daemon.cli("run", "speaker", "Why", "is", "it")
    assert (done.stdout, done.stderr) == (f"{ANSWER}\n\n", "")


def test_piped_input_stands_before_the_prompt(daemon: Daemon) -> None:
    assert prompt_tokens(daemon, input="some text\n") == prompt_tokens(daemon, "some text\n")
    assert prompt_tokens(daemon, "sum", "up:", input="some text") == prompt_tokens(daemon, "some text sum up:")


def test_verbose(daemon: Daemon) -> None:
    lines = daemon.cli("run", "--verbose", "speaker", "hi").stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "total duration",
        "load duration",
        "prompt eval count",
        "prompt eval duration",
        "prompt eval rate",
        "eval count",
        "eval duration",
        "eval rate",
    ]


def test_no_prompt_and_no_terminal_loads_the_model(daemon: Daemon) -> None:
    daemon.ok("stop", "speaker")
    assert daemon.ok("run", "speaker", "--keepalive", "30m") == ""
    assert rows(daemon.ok("ps", "speaker"))[1][5].startswith(("29", "30"))


def test_thinking(daemon: Daemon) -> None:
    thought = "Thinking...\nLet me see\n...done thinking.\n\n"
    assert daemon.ok("run", "thinker", "hi") == f"{thought}Yes.\n\n"
    assert daemon.ok("run", "thinker", "--think", "hi") == f"{thought}Yes.\n\n"
    assert daemon.ok("run", "thinker", "--hidethinking", "hi") == "Yes.\n\n"
    assert "Thinking..." not in daemon.ok("run", "thinker", "--think=false", "hi")
    done = daemon.cli("run", "speaker", "--think=low", "hi")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        'warning: model "speaker" does not support thinking output',
        'Error: "speaker" does not support thinking',
    ]


def test_embedding(daemon: Daemon) -> None:
    vector = json.loads(daemon.ok("run", "embedder", "some text"))
    assert len(vector) == 128 and sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    assert len(json.loads(daemon.ok("run", "embedder", "--dimensions", "16", input="some text"))) == 16
    done = daemon.cli("run", "embedder")
    assert done.returncode == 1 and "embedding models require input text" in done.stderr


def test_format_reaches_the_server(daemon: Daemon) -> None:
    assert json.loads(daemon.ok("run", "--format", '{"const": [1]}', "speaker", "hi")) == [1]
    done = daemon.cli("run", "--format", '{"type": "objekt"}', "speaker", "hi")
    assert done.returncode == 1 and "Invalid type: objekt" in done.stderr, done


def test_an_interrupted_answer_ends_the_generation(daemon: Daemon) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "endless", "count"],
        env=daemon.environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(60).startswith(b" zero one two three")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors.strip()) == (130, b"")
    with daemon.client() as client:
        deadline = time.monotonic() + 5
        while (stats := client.ps(verbose=True).models[0].engine["stats"])["num_running"]:
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
        assert stats["used_blocks"] == 0 and stats["integrity"] == "ok"


def test_a_reader_that_leaves_is_no_error(daemon: Daemon) -> None:
    """`ollamapy run endless | head -c 40`."""
    command = " ".join([*COMMAND, "run", "endless", "count"]) + " | head -c 40"
    done = subprocess.run(command, shell=True, env=daemon.environment, cwd=ROOT, capture_output=True, input=b"", timeout=30)
    assert len(done.stdout) == 40 and done.stderr == b""
