"""What the files of models take in memory: bytes of weights by kind of device. Decides nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ollamapy.env import Settings
from ollamapy.errors import NotFound
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.models.config import ModelConfig

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

    Kernels named in `packed_on` keep matrices as the file has them, and an embedding that is the head too once; the reference
    makes matrices float32, and the head of such a model is a second copy.
    """
    packs = () if settings.kernels == "reference" else packed_on
    layers = 1 + max((int(found[1]) for name in tensors if (found := _LAYER.match(name))), default=-1)
    return {kind: _weight_bytes(tensors, layers, kind in packs) for kind in ("cpu", "cuda")}


def _weight_bytes(tensors: Mapping[str, TensorInfo], num_layers: int, packed: bool) -> WeightBytes:
    layers, rest = [0] * num_layers, 0
    for name, tensor in tensors.items():
        own = name == "token_embd.weight"
        size = tensor.nbytes if packed or own else 4 * math.prod(tensor.shape)
        if own and not packed and "output.weight" not in tensors:
            size += 4 * math.prod(tensor.shape)
        if found := _LAYER.match(name):
            layers[int(found[1])] += size
        else:
            rest += size
    return WeightBytes(tuple(layers), rest)
