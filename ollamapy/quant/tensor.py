"""QuantTensor: a tensor's bytes as they stand in the file, with type and shape: a tensor's property, no module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType, row_nbytes
from ollamapy.quant.dequant import dequantize


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """`data` is uint8 (rows..., bytes per row); `shape` counts elements, in torch order; rows are whole blocks."""

    data: Tensor
    type: GGMLType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        row = row_nbytes(self.type, self.shape[-1])
        assert self.data.dtype == torch.uint8 and tuple(self.data.shape) == (*self.shape[:-1], row), (
            self.data.dtype,
            self.data.shape,
            self.type,
            self.shape,
        )

    @classmethod
    def wrap(cls, data: Tensor, type: GGMLType, shape: Sequence[int]) -> QuantTensor:
        """From flat uint8 bytes. A scalar becomes one row of one element."""
        shape = tuple(shape) or (1,)
        return cls(data.view(*shape[:-1], row_nbytes(type, shape[-1])), type, shape)

    @classmethod
    def from_file(cls, file: GGUFFile, name: str) -> QuantTensor:
        """A tensor of an open file, mapped and not copied: pages are read when they are touched. Never write to it."""
        info = file.tensors[name]
        with warnings.catch_warnings():  # torch has no read-only tensors and says so
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(file.data(name), dtype=torch.uint8)
        return cls.wrap(data, info.type, info.shape)

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> QuantTensor:
        return QuantTensor(self.data.to(device), self.type, self.shape)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Slice of the first dimension, sharing memory."""
        data = self.data[start:stop]
        return QuantTensor(data, self.type, (data.shape[0], *self.shape[1:]))

    def gather(self, index: Tensor) -> Tensor:
        """Rows `index` (n,) of a matrix, dequantized: (n, E) float32. Only those rows are read."""
        assert len(self.shape) == 2, self.shape
        return dequantize(self.data.index_select(0, index), self.type, (index.numel(), self.shape[1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All values, on the data's device; computed in float32, then rounded to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        return dequantize(self.data, self.type, self.shape, out=out)
