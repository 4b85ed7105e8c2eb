"""What this machine has, as the system tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ollamapy import cores
from ollamapy.env import Settings
from ollamapy.lifecycle import devices as devices_module
from ollamapy.lifecycle.devices import Devices, _memory_limits
from ollamapy.lifecycle.fit import BASE_BYTES


def test_devices_of_this_machine() -> None:
    found = Devices.discover(Settings(cuda_visible_devices="", hip_visible_devices="", rocr_visible_devices=""))
    assert 1 <= found.cpu_cores <= (os.cpu_count() or 1)
    assert 0 < found.free_memory <= found.total_memory
    assert found.gpus == ()
    assert found.emptied().free_memory == found.total_memory
    assert found.without(1 << 60).free_memory == 0
    assert BASE_BYTES["cpu"] < found.total_memory


def test_cores_respect_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("quota", "most"), [("100000 100000", 1), ("10000 100000", 1), ("max 100000", 1 << 10)])
def test_cores_respect_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, most: int) -> None:
    unlimited = cores.physical_cores()
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "CPU_QUOTA", tmp_path / "cpu.max")
    assert cores.physical_cores() == min(unlimited, most)


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
