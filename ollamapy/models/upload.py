"""Weights from a file to a GPU: reads in several threads into a ring of pinned buffers, and copies, while the weights before
are packed. Knows no layer and no kernel; `Lane` is what it asks of a device.

A tensor is read in pieces. A piece's buffer is read into again when its copy is done, and packing waits on the device, not
here, for the copies of its tensor: files, bus and packing work at the same time. Only the ring and the tensors on their way are
held beside the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ollamapy.errors import GGUFError
from ollamapy.gguf.reader import GGUFFile, TensorInfo

PIECE = 16 << 20  # bytes: 1.5 ms of a bus that takes 10 GB/s
BUFFERS = 8  # 128 MiB of pinned memory: 0.1 s to have
THREADS = 4  # one thread reads cached files at 3 to 6 GB/s, four at what the memory gives


class Lane(Protocol):
    """A way to one device, on which copies are done in their order."""

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the host (nbytes,) uint8 that the device can copy from by itself."""
        ...

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device (nbytes,) uint8, for copies of this lane."""
        ...

    def copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        """Starts a copy; the call waits until it is done, in any thread."""
        ...

    def hand_over(self, tensor: Tensor) -> None:
        """What the device is given to do from now on sees all copies to `tensor`."""
        ...

    def close(self) -> None:
        """Waits for everything, and gives memory back."""
        ...


class CudaLane:
    """A stream beside the one that packs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):  # of its pool: memory that packing still reads is not given out to copies
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event.synchronize

    def hand_over(self, tensor: Tensor) -> None:
        packing = torch.cuda.current_stream(self._device)
        packing.wait_stream(self._stream)
        tensor.record_stream(packing)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class _Piece(NamedTuple):
    """Bytes of a file, and where they go in their tensor."""

    part: int
    offset: int
    start: int
    nbytes: int


class Upload:
    """Tensors of an open file on a device, in the order that is given; each is one tensor of the file, or several of one shape
    and type, stacked. Use as a context manager.

    `next` gives bytes on the device, flat, and raises GGUFError where the file has become shorter, OSError where it cannot be
    read, and what torch raises.
    """

    def __init__(self, file: GGUFFile, lane: Lane, wanted: Sequence[Sequence[TensorInfo]]) -> None:
        self._lane, self._paths = lane, file.part_paths
        self._tensors = iter([_pieces(sources) for sources in wanted])
        every = [piece for sources in wanted for piece in _pieces(sources)]
        self._left = iter(every)
        largest = max((piece.nbytes for piece in every), default=0)
        self._stack = ExitStack()
        self._stack.callback(lane.close)
        self._threads = self._stack.enter_context(ThreadPoolExecutor(THREADS, "upload"))
        self._buffers = [lane.buffer(largest) for _ in range(min(BUFFERS, len(every)))]
        self._reads: deque[tuple[Tensor, Future[None]]] = deque()
        for buffer in self._buffers:
            self._begin(buffer, lambda: None)

    def _begin(self, buffer: Tensor, is_free: Callable[[], None]) -> None:
        """Reads the next piece into a buffer, when the copy before has been made from it."""
        piece = next(self._left, None)
        if piece is not None:
            self._reads.append((buffer, self._threads.submit(self._read, piece, buffer, is_free)))

    def _read(self, piece: _Piece, buffer: Tensor, is_free: Callable[[], None]) -> None:
        is_free()
        path, done = self._paths[piece.part], 0
        view = memoryview(buffer.numpy())[: piece.nbytes]  # type: ignore[arg-type]
        with path.open("rb", buffering=0) as file:
            file.seek(piece.offset)
            while done < piece.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise GGUFError(path, "tensor data", piece.offset + done, "the file ends here")
                done += count

    def next(self) -> Tensor:
        """The next tensor's bytes (n,) uint8."""
        pieces = next(self._tensors)
        found = self._lane.empty(sum(piece.nbytes for piece in pieces))
        for piece in pieces:
            buffer, read = self._reads.popleft()
            read.result()
            copied = self._lane.copy(found[piece.start : piece.start + piece.nbytes], buffer[: piece.nbytes])
            self._begin(buffer, copied)
        self._lane.hand_over(found)
        return found

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, read in self._reads:
            read.cancel()
        self._reads.clear()
        self._stack.close()


def _pieces(sources: Sequence[TensorInfo]) -> list[_Piece]:
    pieces, start = [], 0
    for source in sources:
        for done in range(0, source.nbytes, PIECE):
            pieces.append(_Piece(source.part, source.offset + done, start + done, min(PIECE, source.nbytes - done)))
        start += source.nbytes
    return pieces


def lane(device: torch.device) -> Lane | None:
    """The way to a device; None where weights are read from the mapped file."""
    return CudaLane(device) if device.type == "cuda" else None
