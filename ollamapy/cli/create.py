"""`create`: reads a Modelfile, hashes and uploads the files it names, has the server make the model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from ollamapy import modelfile
from ollamapy.api.client import Client
from ollamapy.api.types import CreateRequest
from ollamapy.cli.progress import Steps, steps
from ollamapy.errors import BadRequest, NotFound
from ollamapy.modelfile import Modelfile

DEFAULT_FILE = "Modelfile"
STDIN = "-"


def read_modelfile(file: str) -> tuple[Modelfile, Path]:
    """The Modelfile and the folder that its paths are relative to. Without one, the folder itself is the model."""
    if file == STDIN:
        return modelfile.parse(sys.stdin.buffer.read()), Path.cwd()
    path = Path(file or DEFAULT_FILE).absolute()
    try:
        return modelfile.parse(path.read_bytes()), path.parent
    except FileNotFoundError:
        if file:
            raise NotFound(f"open {file}: no such file or directory") from None
        return modelfile.parse("FROM ."), path.parent
    except OSError as error:
        raise BadRequest(f"open {file}: {(error.strerror or str(error)).lower()}") from error


def create(client: Client, name: str, source: Modelfile, base: Path, quantize: str = "", draft_quantize: str = "") -> None:
    """Raises what reading the files and the server raise; progress goes to stderr."""
    client.version()  # before gigabytes are hashed for nobody
    with steps() as progress:
        progress.step("gathering model components")
        prepared = modelfile.to_request(source, base, lambda path: _report(progress, f"hashing {path.name}"))
        for warning in prepared.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        for digest, path in prepared.uploads.items():
            if not client.has_blob(digest):
                client.upload_blob(digest, path, _report(progress, f"copying file {digest}"))
        request = msgspec.convert({**prepared.body, "model": name}, CreateRequest)
        request.quantize, request.draft_quantize = quantize or request.quantize, draft_quantize
        for line in client.create(request):
            progress.step(line.status, line.completed, line.total)


def _report(progress: Steps, text: str) -> Callable[[int, int], None]:
    return lambda done, total: progress.step(text, done, total)
