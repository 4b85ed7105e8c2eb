"""What the files of models take in memory: bytes of weights by kind of device. Decides nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ollamapy.env import Settings
from ollamapy.errors import GGUFError, NotFound
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.models.config import ModelConfig
from ollamapy.quant.forms import CODED, packed_nbytes, planes_nbytes

RANK_STEP = 32  # as `models.adapter` has it
_LAYER = re.compile(r"blk\.(\d+)\.")


class WeightBytes(NamedTuple):
    """Bytes of a model's weights: of each layer, and of what belongs to none."""

    layers: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.layers) + self.rest


class Beside(NamedTuple):
    """A draft model that goes where the model goes; `weights` as in `plan`."""

    path: str
    config: ModelConfig
    weights: Mapping[str, WeightBytes]


def read_beside(path: Path, packed_on: Sequence[str], settings: Settings) -> Beside:
    """What placement needs of a draft model. Raises NotFound, GGUFError, UnsupportedModel."""
    try:
        opened = GGUFFile.open(path)
    except FileNotFoundError:
        raise NotFound("the draft model's file is not there, try pulling the model again") from None
    with opened:
        metadata, tensors = normalise(opened.metadata, opened.tensors)
        return Beside(str(path), ModelConfig.from_gguf(metadata), weight_bytes(tensors, packed_on, settings))


def weight_bytes(tensors: Mapping[str, TensorInfo], packed_on: Sequence[str], settings: Settings) -> dict[str, WeightBytes]:
    """Device kind -> bytes that the weights take there once loaded.

    Kernels named in `packed_on` keep matrices as the file has them, but for some types, and an embedding that is the head too
    once (the CPU's not one of those types); the reference makes matrices float32, the head of such a model being a second copy.
    """
    packs = () if settings.kernels == "reference" else packed_on
    layers = 1 + max((int(found[1]) for name in tensors if (found := _LAYER.match(name))), default=-1)
    return {kind: _weight_bytes(tensors, layers, kind if kind in packs else "") for kind in ("cpu", "cuda")}


def adapter_bytes(path: Path) -> int:
    """Of a LoRA adapter once an engine has loaded it: float32, its rank filled up to a multiple of RANK_STEP. 0 for a file that
    is missing or damaged: the engine says so when it is to load it."""
    try:
        with GGUFFile.open(path) as file:
            shapes = {name: info.shape for name, info in file.tensors.items() if len(info.shape) == 2}
    except (OSError, GGUFError):
        return 0
    total = 0
    for name, (rows, columns) in shapes.items():
        rank, length = (rows, columns) if name.endswith(".lora_a") else (columns, rows)
        total += 4 * length * -(-rank // RANK_STEP) * RANK_STEP
    return total


def _weight_bytes(tensors: Mapping[str, TensorInfo], num_layers: int, packs: str) -> WeightBytes:
    """`packs`: the kind of device whose kernels pack, "" for the reference."""
    layers, rest = [0] * num_layers, 0
    for name, tensor in tensors.items():
        size = _matrix_bytes(tensor, packs)
        if name == "token_embd.weight":
            tied = "output.weight" not in tensors
            once = packs and (packs == "cuda" or tensor.type not in CODED)
            rows = size if packs == "cuda" else tensor.nbytes  # elsewhere they are read from the file
            size = (size if once else size + rows) if tied else rows
        if found := _LAYER.match(name):
            layers[int(found[1])] += size
        else:
            rest += size
    return WeightBytes(tuple(layers), rest)


def _matrix_bytes(tensor: TensorInfo, packs: str) -> int:
    """As the kernels hold it; vectors are float32 everywhere."""
    if not packs or len(tensor.shape) < 2:
        return 4 * math.prod(tensor.shape)
    if packs == "cpu":
        return packed_nbytes(tensor.type, tensor.shape)
    return planes_nbytes(tensor.type, tensor.shape)
