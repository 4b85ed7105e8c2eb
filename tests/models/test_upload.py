"""Uploads by a device that copies as late as it may: no buffer is read into too early, nothing is used before it is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ollamapy.errors import GGUFError
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.models import upload
from ollamapy.models.load import load_model
from ollamapy.models.upload import Upload
from tests.models.paged import Paged
from tests.models.tiny import Tiny, converted, reference_model, write_tensors

CPU = torch.device("cpu")


class Late:
    """A `Lane` whose copies are done when somebody waits for them, and not before."""

    def __init__(self) -> None:
        self._lock, self._begun, self._done = threading.Lock(), list[tuple[Tensor, Tensor]](), 0
        self.num_buffers, self.bytes_handed, self.closed = 0, 0, False

    def buffer(self, nbytes: int) -> Tensor:
        self.num_buffers += 1
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0x55, dtype=torch.uint8)

    def copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        self._begun.append((to, source))
        count = len(self._begun)
        return lambda: self._finish(count)

    def _finish(self, count: int) -> None:
        with self._lock:
            for to, source in self._begun[self._done : count]:
                to.copy_(source)
            self._done = max(self._done, count)

    def hand_over(self, tensor: Tensor) -> None:
        self._finish(len(self._begun))
        self.bytes_handed += tensor.numel()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE", 1000)
    monkeypatch.setattr(upload, "BUFFERS", 3)


def write(folder: Path, sizes: list[int]) -> tuple[Path, dict[str, bytes]]:
    """A file of int8 tensors of so many bytes."""
    numbers = torch.Generator().manual_seed(1)
    data = {
        f"t{i}": bytes(torch.randint(0, 256, (size,), generator=numbers, dtype=torch.uint8).numpy())
        for i, size in enumerate(sizes)
    }
    entries = [(name, GGMLType.I8, (len(part),), memoryview(part)) for name, part in data.items()]
    write_gguf(folder / "t.gguf", {"general.architecture": "none"}, entries)
    return folder / "t.gguf", data


@pytest.mark.parametrize("sizes", [[1], [999, 1000, 1001], [50_000, 3, 7_777, 12_000, 1, 1]])
def test_every_tensor_comes_whole_and_in_order(tmp_path: Path, sizes: list[int]) -> None:
    path, data = write(tmp_path, sizes)
    lane = Late()
    order = [["t0"], *([name] for name in reversed(data)), list(data)]  # a tensor that is wanted twice, and all of them stacked
    with GGUFFile.open(path) as file, Upload(file, lane, [[file.tensors[n] for n in names] for names in order]) as source:
        for names in order:
            assert bytes(source.next().numpy()) == b"".join(data[name] for name in names), names
    assert lane.num_buffers <= 3 and lane.closed


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path, _ = write(tmp_path, [5000, 5000])
    lane = Late()
    with GGUFFile.open(path) as file:
        infos = list(file.tensors.values())
        with path.open("r+b") as shorter:
            shorter.truncate(infos[1].offset + 2500)
        with Upload(file, lane, [[info] for info in infos]) as source:
            source.next()
            with pytest.raises(GGUFError, match="the file ends here"):
                source.next()
    assert lane.closed and not [thread for thread in threading.enumerate() if thread.name.startswith("upload")]


def test_left_in_the_middle(tmp_path: Path) -> None:
    path, _ = write(tmp_path, [5000] * 9)
    lane = Late()
    with GGUFFile.open(path) as file:
        wanted = [[info] for info in file.tensors.values()]
        with pytest.raises(KeyboardInterrupt), Upload(file, lane, wanted) as source:
            source.next()
            raise KeyboardInterrupt
    assert lane.closed and not [thread for thread in threading.enumerate() if thread.name.startswith("upload")]


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Gemma2ForCausalLM"])
def test_a_model_is_the_one_that_is_read_where_it_lies(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts that the file has one by one, and a head that is the embedding."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "MixtralForCausalLM" else {}
    tiny = Tiny(kind, settings)
    metadata, tensors = converted(tiny, reference_model(tiny), tmp_path)
    for name in [name for name in tensors if "_exps" in name]:
        stacked = tensors.pop(name)
        tensors |= {name.replace("_exps", f".{expert}"): stacked[expert] for expert in range(4)}
    write_tensors(tmp_path / "m.gguf", metadata, tensors)

    def logits() -> Tensor:
        with GGUFFile.open(tmp_path / "m.gguf") as file:
            return Paged(load_model(file, CPU)).logits({"a": range(3, 20)})["a"]

    want, lane = logits(), Late()
    monkeypatch.setattr(upload, "lane", lambda device: lane)
    assert torch.equal(logits(), want)
    assert lane.closed and lane.bytes_handed >= sum(tensor.nbytes for tensor in tensors.values())
