"""Tiny random models: made by transformers, written to GGUF by our name maps, loaded by our loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollamapy.convert.maps import MAPS, convert_tensors
from ollamapy.convert.metadata import architecture_metadata, rope_tensors
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model

BASE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / heads, on purpose
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Tiny:
    """A transformers class with the settings that make it exercise something."""

    cls: str
    config: dict[str, Any] = field(default_factory=dict)
    context_length: int = 0  # what our loader is told


def reference_model(tiny: Tiny) -> Any:
    """The transformers model, its parameters perturbed: with the default ones (norms 1, biases 0) errors would not show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    cls = getattr(transformers, tiny.cls)
    model = cls(cls.config_class(**{**BASE, **tiny.config}, attn_implementation="eager")).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.5 * noise if "embed" in name else 0.5 * noise / parameter.shape[-1] ** 0.5)
    return model


def write_tensors(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    entries = [(name, GGMLType.F32, tuple(t.shape), t.contiguous().numpy().data.cast("B")) for name, t in tensors.items()]
    write_gguf(path, metadata, entries)


def converted(tiny: Tiny, model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GGUF metadata and tensors, from the checkpoint as `save_pretrained` lays it out on disk."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    map = MAPS[config["architectures"][0]]
    tensors = dict(convert_tensors(map, config, checkpoint_tensors(folder))) | rope_tensors(config)
    return architecture_metadata(map, config), tensors


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def write_tiny(tiny: Tiny, folder: Path) -> tuple[Any, Path]:
    """The transformers model, and the GGUF file of its weights."""
    reference = reference_model(tiny)
    metadata, tensors = converted(tiny, reference, folder)
    write_tensors(folder / "tiny.gguf", metadata, tensors)
    return reference, folder / "tiny.gguf"


def load_tiny(tiny: Tiny, path: Path, kernels: str) -> Decoder:
    with GGUFFile.open(path) as file:
        return load_model(file, torch.device("cpu"), context_length=tiny.context_length, kernels=kernels)
