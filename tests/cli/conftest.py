"""A daemon with four small models whose answers are known, shared by the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon, running
from tests.scripted import write_scripted

ANSWER = " Hello there how are you today?"
COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
THOUGHT = """{{ range .Messages }}{{ .Role }}: {{ if .Thinking }}
<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}
{{ end }}assistant: """

MODELFILES = {
    "speaker": "FROM speaker.gguf\nSYSTEM Be kind.\nPARAMETER stop nothing\nLICENSE Free.\n",
    "endless": "FROM endless.gguf\n",
    "thinker": f'FROM thinker.gguf\nTEMPLATE """{THOUGHT}"""\nMESSAGE user Ready?\nMESSAGE assistant Always.\n',
    "embedder": "FROM embedder.gguf\n",
}


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("models")
    write_scripted(folder / "speaker.gguf", ["▁Hello", "▁there", "▁how", "▁are", "▁you", "▁today", "?"])
    write_scripted(folder / "endless.gguf", [f"▁{word}" for word in COUNTED], loop=True)
    write_scripted(folder / "thinker.gguf", ["<think>", "▁Let", "▁me", "▁see", "</think>", "▁Yes", "."])
    write_scripted(folder / "embedder.gguf", ["▁word"], llama__pooling_type=1)
    with running(tmp_path_factory.mktemp("home"), OLLAMA_CONTEXT_LENGTH="2048", OMP_NUM_THREADS="1") as made:
        for name, text in MODELFILES.items():
            (folder / name).write_text(text)
            made.ok("create", name, "-f", str(folder / name))
        yield made


@pytest.fixture(scope="session")
def speaker_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaker's words with another name: a file whose blob the store does not have."""
    pieces = ["▁Hello", "▁there", "▁how", "▁are", "▁you", "▁today", "?"]
    return write_scripted(tmp_path_factory.mktemp("gguf") / "another.gguf", pieces, general__name="another")
