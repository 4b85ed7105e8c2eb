"""Module, Layer, Part: the tree of a model. A layer declares the tensors it wants; its attribute path is their name.

`model.blk[3].attn_q` declares "weight", so it gets `blk.3.attn_q.weight`. Plain classes, not torch's modules: parameters,
hooks and state dicts have no use here, and their call costs 1.5 us, 480 times a token. Knows no file, no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ollamapy.ops import Use


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor that a layer needs. `sources` name it where it is not the layer's path: several are stacked into one."""

    shape: tuple[int, ...]
    use: Use
    sources: tuple[str, ...] = ()


class Module:
    """A node of the tree: its children are its attributes that are modules, or lists of modules."""

    def children(self) -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{index}", item) for index, item in enumerate(value) if isinstance(item, Module))


class Layer(Module):
    """A leaf. `tensors` is what it declares; loading sets an attribute of each key."""

    def __init__(self, **tensors: Declared | None) -> None:
        self.tensors = {key: declared for key, declared in tensors.items() if declared is not None}
        for key in tensors:
            setattr(self, key, None)

    def load(self, key: str, value: Any) -> None:
        """`value` is what `ops.prepare` made of the tensor."""
        setattr(self, key, value)


class Part(Module):
    """Layers that belong together, without a name of their own in the file: `blk.3.attention.attn_q` is `blk.3.attn_q`."""


def declared_tensors(module: Module, prefix: str = "") -> Iterator[tuple[str, Layer, str, Declared]]:
    """Every declared tensor below a module: its name in the file, the layer, the layer's key, the declaration."""
    if isinstance(module, Layer):
        for key, declared in module.tensors.items():
            yield prefix + key, module, key, declared
    for name, child in module.children():
        yield from declared_tensors(child, prefix if isinstance(child, Part) else f"{prefix}{name}.")
