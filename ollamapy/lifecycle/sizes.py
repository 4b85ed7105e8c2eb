"""What the files of models take in memory: bytes of weights by kind of device. Decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ollamapy.env import Settings
from ollamapy.errors import NotFound
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.models.config import ModelConfig


class Beside(NamedTuple):
    """A draft model that goes where the model goes; `weights` as in `plan`."""

    path: str
    config: ModelConfig
    weights: Mapping[str, int]


def read_beside(path: Path, packed_on: Sequence[str], settings: Settings) -> Beside:
    """What placement needs of a draft model. Raises NotFound, GGUFError, UnsupportedModel."""
    try:
        opened = GGUFFile.open(path)
    except FileNotFoundError:
        raise NotFound("the draft model's file is not there, try pulling the model again") from None
    with opened:
        metadata, tensors = normalise(opened.metadata, opened.tensors)
        return Beside(str(path), ModelConfig.from_gguf(metadata), weight_bytes(tensors, packed_on, settings))


def weight_bytes(tensors: Mapping[str, TensorInfo], packed_on: Sequence[str], settings: Settings) -> dict[str, int]:
    """Device kind -> bytes that the weights take there once loaded.

    Kernels named in `packed_on` keep matrices as the file has them; the reference makes them float32. The embedding stays
    as it is, and is a matrix too where there is no `output.weight`: the CPU's kernels then hold it once.
    """
    embedding = tensors.get("token_embd.weight")
    matrices = [tensor for name, tensor in tensors.items() if name != "token_embd.weight"]
    if embedding is not None and "output.weight" not in tensors:
        matrices.append(embedding)
    rows = embedding.nbytes if embedding is not None else 0
    tied = rows if "output.weight" not in tensors else 0
    dense = rows + sum(4 * math.prod(tensor.shape) for tensor in matrices)
    packs = () if settings.kernels == "reference" else packed_on
    packed = rows + sum(tensor.nbytes for tensor in matrices)
    once = {"cpu": tied, "cuda": 0}
    return {kind: packed - once[kind] if kind in packs else dense for kind in ("cpu", "cuda")}
