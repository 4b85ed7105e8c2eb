"""`accelerator.Cuda` where a recording fails, on a `torch.cuda` that behaves there as torch's source does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ollamapy.engine.accelerator import Cuda, Recorded
from ollamapy.engine.batch import Move

ONE, TWO = torch.device("cuda", 0), torch.device("cuda", 1)


class Graph:
    ended = False
    stream = pool = None

    def __init__(self, fake: Fake) -> None:
        self._fake = fake

    def replay(self) -> None:
        self._fake.replayed.append(self)


class Fake:
    """Streams as (device, name), and recordings that end only on the stream, and the device, on which they began."""

    def __init__(self) -> None:
        self.device = 0
        self.current = {0: (0, "default"), 1: (1, "default")}
        self.num_streams = 0
        self.replayed: list[Any] = []
        self.invalid = False  # a call that CUDA forbids while recording has been made

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    @contextmanager
    def stream(self, stream: tuple[int, str]) -> Iterator[None]:
        before, there = (self.device, self.current[self.device]), self.current[stream[0]]
        self.device, self.current[stream[0]] = stream[0], stream
        try:
            yield
        finally:
            self.current[stream[0]] = there
            self.device, self.current[before[0]] = before[0], before[1]

    def new_stream(self, device: torch.device) -> tuple[int, str]:
        self.num_streams += 1
        return device.index, f"stream {self.num_streams}"

    def new_graph(self) -> Graph:
        return Graph(self)

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: tuple[int, str], capture_error_mode: str) -> Iterator[None]:
        before = self.device, self.current[self.device]
        self.device, self.current[stream[0]] = stream[0], stream
        graph.stream, graph.pool = stream, pool
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError("operation failed due to a previous error during capture")  # the stream stays in force
            assert self.current[self.device] == stream, "Capture must end on the same stream it began on."
            graph.ended = True
            self.device, self.current[before[0]] = before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    replaced: dict[str, Callable[..., Any]] = {
        "device": made.on,
        "stream": made.stream,
        "graph": made.graph,
        "current_stream": lambda device: made.current[device.index],
        "current_device": lambda: made.device,
        "Stream": made.new_stream,
        "CUDAGraph": made.new_graph,
        "graph_pool_handle": object,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return made


def test_a_recording_that_cannot_be_ended(fake: Fake) -> None:
    """The stream in force is the one before, or the next step would not wait for those before it. The graph is kept: torch's
    allocator still asks it."""
    cuda = Cuda([ONE])

    def run(move: Move) -> None:
        fake.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError):
        cuda.record(run)
    assert fake.current == {0: (0, "default"), 1: (1, "default")} and fake.device == 0
    assert len(cuda._failed) == 1


def test_a_recording_without_memory(fake: Fake) -> None:
    """Ends as it should, and leaves nothing."""
    cuda = Cuda([ONE])

    def run(move: Move) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda.record(run)
    assert fake.current[0] == (0, "default") and not cuda._failed


def test_a_pool_that_nothing_uses_is_not_used_again(fake: Fake) -> None:
    """Torch refuses the handle of a pool that it has given back."""
    cuda, pools = Cuda([ONE]), []

    def record() -> Recorded:
        made = cuda.record(lambda move: None)
        made.replay()
        pools.append(fake.replayed.pop().pool)
        return made

    first = record()
    second = record()
    assert pools[0] is pools[1]
    del first
    third = record()
    assert pools[2] is pools[1], "the second is there still"
    del second, third
    gc.collect()
    record()
    assert pools[3] is not pools[2]


def test_pieces(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on its device's stream and pool; replayed in their order, each followed by the copy to the next."""
    monkeypatch.setattr(torch, "empty_like", lambda source, device: source.new_zeros(source.shape))
    cuda, seen, source = Cuda([ONE, TWO]), list[tuple[int, str]](), torch.zeros(2)
    targets = []

    def run(move: Move) -> None:
        seen.append(fake.current[fake.device])
        targets.append(move(source, TWO))
        seen.append(fake.current[fake.device])
        targets.append(move(targets[0], ONE))
        seen.append(fake.current[fake.device])

    recorded = cuda.record(run)
    assert seen == [(0, "stream 1"), (1, "stream 2"), (0, "stream 1")] and fake.current[1] == (1, "default")
    source.fill_(3.0)
    recorded.replay()
    first, second, third = fake.replayed
    assert first.ended and second.ended and third.ended
    assert first.pool is third.pool is not second.pool
    assert [target.tolist() for target in targets] == [[3.0, 3.0]] * 2


def test_a_device_without_a_number_is_the_current_one(fake: Fake) -> None:
    """Memory is counted by device, and tensors are on numbered ones."""
    assert Cuda([torch.device("cuda")]).devices == (ONE,)
