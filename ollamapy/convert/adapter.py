"""LoRA adapters of PEFT as GGUF: names, order of rows and scales are those of llama.cpp's files. Knows no store and no model
that is loaded; what cannot be carried over is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ollamapy.convert.maps import MAPS, NameMap, gguf_name
from ollamapy.convert.safetensors import SafetensorsFile
from ollamapy.errors import BadRequest, UnsupportedModel
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf

Array = np.ndarray[Any, np.dtype[np.float32]]
_HALF = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_([AB])(?:\.default)?\.weight")
_SHOWN = 8


class AdapterConfig(msgspec.Struct):
    """Of adapter_config.json, what changes the result."""

    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    alpha_pattern: dict[str, float] = {}

    @classmethod
    def parse(cls, data: bytes) -> AdapterConfig:
        """Raises BadRequest, and UnsupportedModel for an adapter of another kind than plain LoRA."""
        try:
            config = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise BadRequest(f"adapter_config.json: {error}") from None
        kinds = {
            f"peft_type {config.peft_type}": config.peft_type != "LORA",
            "use_dora": config.use_dora,
            f"bias {config.bias}": config.bias != "none",
            "fan_in_fan_out": config.fan_in_fan_out,
            f"lora_alpha {config.lora_alpha}": not 0.0 < config.lora_alpha < math.inf,
        }
        if found := [kind for kind, is_so in kinds.items() if is_so]:
            raise UnsupportedModel(f"adapters with {', '.join(found)} are not supported")
        return config

    def scale(self, module: str, rank: int) -> float:
        """What B(Ax) is multiplied with: alpha / r, or alpha / sqrt(r) (rank-stabilised LoRA, Kalajdzievski 2023)."""
        matches = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({re.escape(key)})$", module))
        return next(matches, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def convert_adapter(
    config: AdapterConfig, file: SafetensorsFile, architecture: str, heads: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata and tensors of the GGUF file. `heads`: num_attention_heads and num_key_value_heads of the base, as in its
    config.json. A scale that is not alpha / r goes into lora_b. Raises UnsupportedModel, with names, for what has no place."""
    maps = [map for map in MAPS.values() if map.architecture == architecture]
    if not maps:
        raise UnsupportedModel(f"safetensors adapters for the architecture {architecture} are not supported")
    pairs: dict[str, dict[str, str]] = {}
    strange = []
    for name in file:
        match = _HALF.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            pairs.setdefault(match[1], {})[match[2]] = name
    strange += [f"{module} (only one half)" for module, halves in pairs.items() if len(halves) == 1]
    if strange or not pairs:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise UnsupportedModel(f"the adapter has tensors that are no LoRA of a matrix: {', '.join(strange[:_SHOWN])}{more}")
    tensors: dict[str, Array] = {}
    for module, halves in pairs.items():
        target, transform = _target(maps, module)
        a, b = file.tensor(halves["A"]), file.tensor(halves["B"])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size:
            raise UnsupportedModel(f"the adapter's {module}: lora_A {a.shape} and lora_B {b.shape} are no pair")
        if transform is not None:  # of the matrix's rows, which are B's
            b = transform(b, heads)
        factor = config.scale(module, a.shape[0]) * a.shape[0] / config.lora_alpha
        tensors[f"{target}.lora_a"] = np.ascontiguousarray(a)
        tensors[f"{target}.lora_b"] = np.ascontiguousarray(b if factor == 1.0 else b * np.float32(factor))
    metadata = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.lora_alpha),
    }
    return metadata, tensors


def write_adapter(path: Path, config: AdapterConfig, file: SafetensorsFile, base: GGUFFile) -> None:
    """The GGUF file at `path`, for the base model. Raises as `convert_adapter`, and for matrices that the base has not."""
    metadata = base.metadata
    architecture = str(metadata.get("general.architecture", ""))
    counts = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv"}
    heads = {key: metadata.get(f"{architecture}.attention.{name}", 0) for key, name in counts.items()}
    heads["num_key_value_heads"] = heads["num_key_value_heads"] or heads["num_attention_heads"]
    if not all(isinstance(count, int) and count > 0 for count in heads.values()):
        raise UnsupportedModel(
            f"safetensors adapters for a {architecture} model with other heads in each layer are not supported"
        )
    header, tensors = convert_adapter(config, file, architecture, heads)
    for name, values in tensors.items():
        matrix, _, half = name.rpartition(".")
        info = base.tensors.get(matrix)
        shape = None if info is None or len(info.shape) != 2 else info.shape
        if shape is None or values.shape[half == "lora_a"] != shape[half == "lora_a"]:
            raise UnsupportedModel(f"the adapter does not fit the model: {name} {values.shape} for a matrix {shape}")
    entries = [(name, GGMLType.F32, values.shape, values.data.cast("B")) for name, values in tensors.items()]
    write_gguf(path, header, entries)


def _target(maps: list[NameMap], module: str) -> tuple[str, Any]:
    """GGUF name of a module's matrix, and what happens to its rows. Raises UnsupportedModel."""
    for map in maps:
        try:
            name, expert = gguf_name(map, f"{module}.weight")
        except UnsupportedModel:
            continue
        if name.startswith("blk.") and expert is None:
            return name, map.transforms.get(name.split(".")[-2])
    raise UnsupportedModel(f"the adapter changes {module}, which is not a matrix of a layer of {maps[0].architecture}")
