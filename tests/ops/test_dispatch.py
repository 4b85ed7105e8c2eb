"""The table: order, forced families, reasons, and what `chosen` says."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from ollamapy import kernel_table, ops
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.types import GGMLType
from ollamapy.kernel_table import kernels_for
from ollamapy.ops import Kernel
from ollamapy.quant.tensor import QuantTensor
from tests.ops.tensors import float32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    ops.choose(CPU)


def _add(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> None:
    monkeypatch.setattr(kernel_table, "TABLE", (*kernels, *kernel_table.TABLE))


def test_every_op_has_a_reference_that_runs_anywhere() -> None:
    for op in {kernel.op for kernel in kernel_table.TABLE}:
        last = kernels_for(op)[-1]
        assert last.family == "reference", op
        assert last.needs(ops.Place(torch.device("meta"), GGMLType.F32)) == "", op


def test_the_first_that_can_serve_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Kernel("softcap", "csrc", lambda x, cap: x, lambda place: "" if place.device.type == "cpu" else "only on a CPU")
    _add(monkeypatch, fast)
    ops.choose(CPU)
    assert ops.chosen()["softcap"] == "csrc"
    assert ops.softcap(torch.full((1,), 99.0), 1.0).item() == 99.0
    ops.choose(CPU, "reference")
    assert ops.chosen()["softcap"] == "reference"
    assert ops.softcap(torch.full((1,), 99.0), 1.0).item() == 1.0


def test_a_fallback_is_logged_once_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _add(monkeypatch, Kernel("softcap", "triton", lambda x, cap: x, lambda place: "no such compiler"))
    for _ in range(3):
        ops.choose(CPU)
    messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == ["softcap runs on the reference kernel (triton: no such compiler)"]


def test_a_kernel_may_serve_some_types_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(place: ops.Place) -> str:
        return "" if place.type is GGMLType.Q8_0 else "not this type"

    _add(monkeypatch, Kernel("linear", "triton", lambda x, w, bias: w, needs, lambda weight, device: "packed"))
    ops.choose(CPU)
    q8 = ops.prepare(QuantTensor(torch.zeros(2, 34, dtype=torch.uint8), GGMLType.Q8_0, (2, 32)), CPU, "linear")
    dense = ops.prepare(float32(torch.ones(2, 32)), CPU, "linear")
    assert isinstance(q8, ops.Weight) and isinstance(dense, ops.Weight)
    assert (q8.data, q8.shape, q8.kernel.family, dense.kernel.family) == ("packed", (2, 32), "triton", "csrc")
    assert ops.chosen()["linear"] == "triton, csrc"


def test_a_type_without_any_kernel_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"no kernel for linear on cpu \(csrc: no decoder for I32; reference: no decoder for I32\)"
    ):
        ops.choose(CPU)
        ops.prepare(QuantTensor(torch.zeros(2, 16, dtype=torch.uint8), GGMLType.I32, (2, 4)), CPU, "linear")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_precise_models_on_a_gpu_run_on_triton(device: str) -> None:
    """The CUDA kernels round activations to int8; what serves both wishes is the same for both."""
    choice, place = ops.Choice(), ops.Place(torch.device(device), GGMLType.Q4_K)
    picked = {}
    for choice.precise in (False, True):
        picked[choice.precise] = {op: choice.pick(op, place) for op in ("linear", "embedding", "moe", "stack", "attention")}
    assert {kernel.family for kernel in picked[True].values()} == {"triton"}
    assert picked[False]["linear"].precise is False and picked[True]["linear"].precise is True
    assert picked[False]["attention"] is picked[True]["attention"]


def test_kernels_are_launched_on_the_device_whose_turn_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the thread's current device, not on that of its tensors."""
    current: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    choice = ops.Choice()
    for name in ("cuda:1", "cpu", "cuda:0"):
        choice.resolve(torch.device(name), "", (), False)
    choice.switch(torch.device("cuda:1"))
    assert current == [1, 0, 1]


def test_unknown_family() -> None:
    with pytest.raises(UnsupportedModel, match='unknown kernel family "cutlass"'):
        ops.choose(CPU, "cutlass")


def test_moe_and_dense_weights() -> None:
    dense = ops.prepare(float32(torch.ones(5)), CPU, "dense")
    assert isinstance(dense, torch.Tensor) and torch.equal(dense, torch.ones(5))
    experts = ops.prepare(float32(torch.ones(3, 2, 4)), CPU, "linear")
    assert isinstance(experts, ops.Weight) and experts.data.shape == (3, 2, 4)


def test_threads_go_to_whose_kernels_are_in_force(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    try:
        for family, loading, expected in (("", False, 1), ("", True, 2), ("reference", False, 2), ("csrc", False, 1)):
            ops.choose(CPU, family)
            ops.set_threads(2, loading=loading)
            assert torch.get_num_threads() == expected, (family, loading)
        assert not caplog.records
        ops.set_threads(300)
        assert "256 threads, not 300" in caplog.text
    finally:
        ops.set_threads(2)
        torch.set_num_threads(before)
