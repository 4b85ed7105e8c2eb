"""Layer: a module that declares the tensors it wants from a model file. Its attribute path is the tensors' name.

`model.blk[3].attn_q` declares "weight", so it gets `blk.3.attn_q.weight`. Knows no file and no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ollamapy.ops import Use


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor that a layer needs. `sources` name it where it is not the layer's path: several are stacked into one."""

    shape: tuple[int, ...]
    use: Use
    sources: tuple[str, ...] = ()


class Layer(nn.Module):
    """A leaf of the module tree. `tensors` is what it declares; loading sets an attribute of each key."""

    def __init__(self, **tensors: Declared | None) -> None:
        super().__init__()
        self.tensors = {key: declared for key, declared in tensors.items() if declared is not None}
        for key in tensors:
            setattr(self, key, None)

    def load(self, key: str, value: Any) -> None:
        """`value` is what `ops.prepare` made of the tensor."""
        setattr(self, key, value)


class Part(nn.Module):
    """Layers that belong together, without a name of their own in the file: `blk.3.attention.attn_q` is `blk.3.attn_q`."""


def declared_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Layer, str, Declared]]:
    """Every declared tensor below a module: its name in the file, the layer, the layer's key, the declaration."""
    if isinstance(module, Layer):
        for key, declared in module.tensors.items():
            yield prefix + key, module, key, declared
    for name, child in module.named_children():
        yield from declared_tensors(child, prefix if isinstance(child, Part) else f"{prefix}{name}.")
