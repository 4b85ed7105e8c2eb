"""What this machine has, as the system tells it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ollamapy.env import load
from ollamapy.lifecycle import devices as devices_module
from ollamapy.lifecycle.devices import Devices, _memory_limits, physical_cores, visible_gpus
from ollamapy.lifecycle.fit import BASE_BYTES


def test_devices_of_this_machine() -> None:
    found = Devices.discover("")
    assert 1 <= found.cpu_cores <= (os.cpu_count() or 1)
    assert 0 < found.free_memory <= found.total_memory
    assert found.gpus == ()
    assert found.emptied().free_memory == found.total_memory
    assert found.without(1 << 60).free_memory == 0
    assert BASE_BYTES["cpu"] < found.total_memory


@pytest.mark.parametrize(("torch", "count"), [("2.11.0", 1), ("2.11.0+cu130", 1), ("2.11.0+cpu", 0)])
def test_a_gpu_that_torch_cannot_use_is_none(
    torch: str, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine would end with "Torch not compiled with CUDA enabled"."""
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetUUID=lambda handle: "GPU-a1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30, free=79 << 30),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(devices_module.metadata, "version", lambda name: torch)
    assert [gpu.name for gpu in Devices.discover().gpus] == ["NVIDIA H100"] * count
    assert ("built for CPUs alone" in caplog.text) == (not count)


def test_cores_respect_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("version", [1, 2])
def test_control_group_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    root = tmp_path if version == 2 else tmp_path / "memory"
    limit, usage = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    inactive = "inactive_file" if version == 2 else "total_inactive_file"
    for group, most, used in (("outer", "1000", 700), ("outer/inner", "max" if version == 2 else str(1 << 62), 300)):
        folder = root / group
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{inactive} 100\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n" if version == 2 else "5:cpu:/x\n3:memory:/outer/inner\n")
    monkeypatch.setattr(devices_module, "_CGROUP", tmp_path)
    assert list(_memory_limits(membership))[-1] == (1000, 600)
    assert list(_memory_limits(tmp_path / "absent")) == []


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0, 7, 1", [0]),
        ("GPU-b", [1]),
        ("GPU-", []),  # not unique
        ("GPU-c1,0", [2, 0]),
        ("1,1", []),
    ],
)
def test_visible_gpus(visible: str | None, numbers: list[int]) -> None:
    assert visible_gpus(visible, ["GPU-a1", "GPU-b1", "GPU-c1"]) == numbers


def test_an_empty_cuda_visible_devices_is_not_an_absent_one() -> None:
    assert load({"CUDA_VISIBLE_DEVICES": ""}).cuda_visible_devices == ""
    assert load({}).cuda_visible_devices is None
