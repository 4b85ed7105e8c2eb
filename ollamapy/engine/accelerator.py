"""What the engine asks of GPUs beside kernels: memory figures, recorded steps, copies that are waited for later.

The one place here that calls `torch.cuda`. A CPU has none of it: there, the engine is given no accelerator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ollamapy.engine.batch import Move


class Recorded(Protocol):
    """Work on the device that can be done again, on whatever its tensors then hold."""

    def replay(self) -> None: ...


class Accelerator(Protocol):
    """The devices of one model. The first has the embedding, the head and what is drawn."""

    devices: tuple[torch.device, ...]

    def record(self, run: Callable[[Move], None]) -> Recorded:
        """Records what `run` gives the devices to do; it may or may not do it, too. `run` begins on the first device and calls
        what it is given to go on with a tensor on another one. Raises what torch raises."""
        ...

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host, not zeroed, from which a copy to the device is begun without waiting for what the device does."""
        ...

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts copying a tensor to the host; the call waits for that copy, and for nothing that was begun later."""
        ...

    def release(self) -> None:
        """Gives memory that torch holds and does not use back to the devices."""
        ...

    def free_bytes(self, device: torch.device) -> int:
        """Memory that can be allocated: the device's, and what torch holds and does not use."""
        ...

    def reserved_bytes(self) -> int:
        """Memory that torch holds, on all devices."""
        ...

    def peak_bytes(self, run: Callable[[], None]) -> list[int]:
        """Most memory of each device that `run` has in use at a time, beyond what was in use before."""
        ...


class _Piece(NamedTuple):
    """Work on one device, and what of it goes to the next piece's."""

    work: Recorded
    source: Tensor | None
    target: Tensor | None


class Pieces:
    """Work on several devices: what `capture` records on each, and the tensors that are copied from one to the next. These are
    held, so that no other recording is given their memory."""

    def __init__(
        self,
        first: torch.device,
        capture: Callable[[torch.device], AbstractContextManager[Recorded]],
        run: Callable[[Move], None],
    ) -> None:
        self._capture, self._pieces, self._stack = capture, list[_Piece](), ExitStack()
        with self._stack:
            self._work = self._stack.enter_context(capture(first))
            run(self._move)
        self._pieces.append(_Piece(self._work, None, None))

    def _move(self, source: Tensor, device: torch.device) -> Tensor:
        self._stack.close()
        target = torch.empty_like(source, device=device)
        self._pieces.append(_Piece(self._work, source, target))
        self._work = self._stack.enter_context(self._capture(device))
        return target

    def replay(self) -> None:
        for work, source, target in self._pieces:
            work.replay()
            if source is not None and target is not None:
                target.copy_(source, non_blocking=True)  # each device waits for the other, the host for none


class Cuda:
    """Devices that PyTorch calls cuda: NVIDIA's and AMD's."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(torch.device("cuda", torch.cuda.current_device()) if d.index is None else d for d in devices)
        self._pools: dict[torch.device, Any] = {}  # memory of recorded steps: they run one after the other and may share it
        self._live: dict[torch.device, list[weakref.ref[Any]]] = {}  # recorded steps of the pool
        self._streams: dict[torch.device, Any] = {}
        self._failed: list[Any] = []

    def record(self, run: Callable[[Move], None]) -> Recorded:
        return Pieces(self.devices[0], self._capture, run)

    @contextmanager
    def _capture(self, device: torch.device) -> Iterator[Recorded]:
        """A recording that failed is kept: where it could not be ended, torch's allocator asks it about each allocation still.
        The outer stream is put back whatever happens: torch leaves its own in force when a recording cannot be ended."""
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            if not any(graph() is not None for graph in self._live.get(device, ())):  # torch forgets a pool that nothing uses
                self._live[device], self._pools[device] = [], torch.cuda.graph_pool_handle()
            pool = self._pools[device]
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            self._live[device].append(weakref.ref(graph))
            stream = self._streams[device]
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    yield graph
            except torch.OutOfMemoryError:
                raise
            except Exception:
                self._failed.append(graph)
                raise

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)  # torch keeps it until the copies from it are done

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.device(tensor.device):
            host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait

    def release(self) -> None:
        torch.cuda.empty_cache()  # of all devices

    def free_bytes(self, device: torch.device) -> int:
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def reserved_bytes(self) -> int:
        return sum(map(torch.cuda.memory_reserved, self.devices))

    def peak_bytes(self, run: Callable[[], None]) -> list[int]:
        self._synchronize()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = [torch.cuda.memory_allocated(device) for device in self.devices]
        run()
        self._synchronize()
        return [torch.cuda.max_memory_allocated(device) - used for device, used in zip(self.devices, before, strict=True)]

    def _synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


def accelerator(device: torch.device, others: Sequence[torch.device] = ()) -> Accelerator | None:
    """That of a model on `device`, which has the head, and `others`; None where one of them has none or it was never tried."""
    devices = tuple(dict.fromkeys((device, *others)))
    return Cuda(devices) if all(each.type == "cuda" for each in devices) else None
