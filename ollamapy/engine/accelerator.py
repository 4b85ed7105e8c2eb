"""What the engine asks of a GPU beside kernels: memory figures, recorded steps, copies that are waited for later.

The one place here that calls `torch.cuda`. A CPU has none of it: there, the engine is given no accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorded(Protocol):
    """Work on the device that can be done again, on whatever its tensors then hold."""

    def replay(self) -> None: ...


class Accelerator(Protocol):
    """One device."""

    def record(self, run: Callable[[], None]) -> Recorded:
        """Records what `run` gives the device to do; it may or may not do it, too. Raises what torch raises."""
        ...

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host, not zeroed, from which a copy to the device is begun without waiting for what the device does."""
        ...

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts copying a tensor to the host; the call waits for that copy, and for nothing that was begun later."""
        ...

    def release(self) -> None:
        """Gives memory that torch holds and does not use back to the device."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be allocated: the device's, and what torch holds and does not use."""
        ...

    def reserved_bytes(self) -> int:
        """Memory that torch holds."""
        ...

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """Most memory that `run` has in use at a time, beyond what was in use before."""
        ...


class Cuda:
    """A device that PyTorch calls cuda: NVIDIA's and AMD's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # memory of all recorded steps: they run one after the other and may share it

    def record(self, run: Callable[[], None]) -> Recorded:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)  # torch keeps it until the copies from it are done

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.device(self._device):
            host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait

    def release(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak_bytes(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def accelerator(device: torch.device) -> Accelerator | None:
    """That of a device; None where there is none or it was never tried."""
    return Cuda(device) if device.type == "cuda" else None
