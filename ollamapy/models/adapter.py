"""LoRA adapters from GGUF files, for a model that is loaded. Every tensor has its matrix, or it is an error that names it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.layers.layer import Layer, declared_tensors
from ollamapy.layers.linear import Linear
from ollamapy.layers.lora import Adapter, Pair
from ollamapy.models.decoder import Decoder
from ollamapy.quant.tensor import QuantTensor

log = logging.getLogger(__name__)

RANK_STEP = 32  # ranks are filled up with zeros to a multiple of it, for kernels that take whole groups
_SHOWN = 8


def load_adapter(path: Path, model: Decoder, device: torch.device) -> Adapter:
    """Raises GGUFError, and UnsupportedModel for a file that is no LoRA adapter, one of another architecture, and tensors
    that the model has no matrix for, or one of another shape."""
    with GGUFFile.open(path) as file:
        _check(file, model.config.architecture)
        matrices: dict[str, Linear] = {
            name: layer
            for name, layer, key, _ in declared_tensors(model)
            if isinstance(layer, Linear) and key == "weight" and name.startswith("blk.")
        }
        tensors = {name: QuantTensor.from_file(file, name).dequantize() for name in _names(file)}
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    halves = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    problems = [f"{name} (not a matrix of the layers)" for name in sorted(halves) if name not in matrices]
    pairs: dict[Layer, Pair] = {}
    for name in sorted(halves & matrices.keys()):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        out, into = matrices[name].tensors["weight"].shape
        if a is None or b is None:
            problems.append(f"{name} (has no lora_{'a' if a is None else 'b'})")
        elif a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != (into, out) or a.shape[0] != b.shape[1]:
            problems.append(f"{name} (lora_a {tuple(a.shape)}, lora_b {tuple(b.shape)} for a matrix ({out}, {into}))")
        else:
            rank = a.shape[0]
            pairs[matrices[name]] = Pair(*_prepared(a, b, device), alpha / rank if alpha else 1.0)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnsupportedModel(f"the adapter does not fit the model: {', '.join(problems[:_SHOWN])}{more}")
    return Adapter(pairs)


def _check(file: GGUFFile, architecture: str) -> None:
    metadata = file.metadata
    kind, own = metadata.get("general.type"), metadata.get("general.architecture")
    if kind != "adapter" or metadata.get("adapter.type") != "lora":
        raise UnsupportedModel("the adapter's file is not a LoRA adapter (general.type adapter, adapter.type lora)")
    if own != architecture:
        raise UnsupportedModel(f"the adapter is for the architecture {own}, the model is {architecture}")
    if "adapter.alora.invocation_tokens" in metadata:
        raise UnsupportedModel("adapters with invocation tokens (aLoRA) are not supported")


def _names(file: GGUFFile) -> list[str]:
    """Of the adapter's tensors; those of norms have no effect, as in llama.cpp."""
    ignored = [name for name in file.tensors if "_norm.weight" in name]
    if ignored:
        log.warning("%s: %d tensors of norms have no effect", file.path.name, len(ignored))
    wrong = [name for name in file.tensors if not name.endswith((".lora_a", ".lora_b")) and name not in ignored]
    if wrong:
        raise UnsupportedModel(f"the adapter has tensors that are no lora_a or lora_b: {', '.join(wrong[:_SHOWN])}")
    return [name for name in file.tensors if name not in ignored]


def _prepared(a: Tensor, b: Tensor, device: torch.device) -> tuple[ops.Weight, ops.Weight]:
    missing, pad = -a.shape[0] % RANK_STEP, torch.nn.functional.pad
    return _weight(pad(a, (0, 0, 0, missing)), device), _weight(pad(b, (0, missing)), device)


def _weight(values: Tensor, device: torch.device) -> ops.Weight:
    data = values.float().contiguous().view(torch.uint8)
    made = ops.prepare(QuantTensor(data, GGMLType.F32, tuple(values.shape)), device, "linear")
    assert isinstance(made, ops.Weight)
    return made
