"""What a row of `kernel_table.TABLE` is: a kernel, the places it serves, a weight in its form. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where an op shall run: on a device, on a tensor type (ops on weights), with heads of some lengths (ops on KV caches)."""

    device: torch.device
    type: GGMLType | None = None
    head_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One implementation of one op. `needs` returns why it cannot serve a place, "" when it can.

    `prepare` brings a weight into the form that `fn` takes; only ops on weights have one. `rows` of a linear kernel is an
    embedding kernel that reads what it prepared. `devices`: the types of device that it is for, () for all; on others it is no
    candidate unless its family is forced, and is passed over in silence. `precise`: False for a kernel that rounds activations,
    True for its counterpart that does not, None where both wishes are served.
    """

    op: str
    family: str
    fn: Callable[..., Any]
    needs: Callable[[Place], str]
    prepare: Callable[[QuantTensor, torch.device], Any] | None = None
    rows: Kernel | None = None
    devices: tuple[str, ...] = ()
    precise: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight in the form its kernel takes, with that kernel."""

    data: Any
    kernel: Kernel
    shape: tuple[int, ...]
