"""A stand-in for a GPU: recorded steps are done again by calling what was recorded, on the same buffers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ollamapy.engine.batch import Move


@dataclass(eq=False)
class Rerun:
    run: Callable[[], None]

    def replay(self) -> None:
        with torch.inference_mode():
            self.run()


@dataclass
class Emulated:
    """An `Accelerator` on the CPU."""

    free: int = 1 << 30
    per_graph: int = 1 << 20
    peak: int = 0
    fails: bool = False
    reserved: int = 0
    num_fetched: int = 0
    waiting: int = 0  # fetches that were not waited for
    most_waiting: int = 0
    num_released: int = 0
    num_recorded: int = 0
    _live: list[weakref.ref[Rerun]] = field(default_factory=list)
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)

    def record(self, run: Callable[[Move], None]) -> Rerun:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.reserved += self.per_graph
        self.num_recorded += 1
        made = Rerun(partial(run, Tensor.to))
        self._live.append(weakref.ref(made))
        return made

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype).fill_(1 << 30)  # what it held before

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        copy = tensor.clone()
        self.num_fetched += 1
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)

        def wait() -> Tensor:
            self.waiting -= 1
            return copy

        return wait

    def release(self) -> None:
        self.num_released += 1
        gc.collect()
        if not any(each() is not None for each in self._live):  # recorded steps share their memory
            self.reserved = 0

    def free_bytes(self, device: torch.device) -> int:
        return self.free

    def reserved_bytes(self) -> int:
        return self.reserved

    def peak_bytes(self, run: Callable[[], None]) -> list[int]:
        run()
        return [self.peak]
