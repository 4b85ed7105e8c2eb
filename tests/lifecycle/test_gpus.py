"""Which GPUs are found: NVML stood in for, AMD's from real folders laid out as the kernel lays out /sys and /dev."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ollamapy.env import Settings, load
from ollamapy.lifecycle import gpus as gpus_module
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.gpus import GPU, chosen, find_gpus, torch_build
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.placement import _gpu_places

GIB = 1 << 30
BUILDS = {
    "cpu": "cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n",
    "cuda": "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
    "hip": "debug = False\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0.51831'\n",
    "xpu": "cuda: Optional[str] = None\nxpu: Optional[str] = '20250201'\n",
}
Card = tuple[
    int, int, int | None, int | None, int
]  # unique_id, gfx_target_version, VRAM total, used (None: no file), render minor
MI300 = (0xA1, 90402, 192 * GIB, 2 * GIB, 129)
RX7900 = (0xB2, 110000, 24 * GIB, 1 * GIB, 128)
APU = (0, 110501, GIB // 2, 100 << 20, 130)


@pytest.fixture(autouse=True)
def forget() -> None:
    gpus_module._warn_once.cache_clear()


def install_torch(folder: Path, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First in sys.path; whoever imported it would fail."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text("raise AssertionError('torch was imported')")
    (folder / "torch/version.py").write_text("from typing import Optional\n\n__version__ = '2.13.0'\n" + BUILDS[build])
    monkeypatch.syspath_prepend(str(folder))


def machine(root: Path, *cards: Card, cpus: int = 2) -> Path:
    """Nodes of `cpus` CPUs, then the cards."""
    nodes, dri = root / "sys/class/kfd/kfd/topology/nodes", root / "dev/dri"
    dri.mkdir(parents=True)
    (root / "dev/kfd").touch()
    for number in range(cpus):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "gpu_id").write_text("0\n")
        (nodes / str(number) / "properties").write_text("cpu_cores_count 16\ngfx_target_version 0\ndrm_render_minor 0\n")
    for number, (unique, version, total, used, minor) in enumerate(cards, cpus):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "gpu_id").write_text(f"{1000 + number}\n")
        text = f"cpu_cores_count 0\ngfx_target_version {version}\nunique_id {unique}\ndrm_render_minor {minor}\n"
        (nodes / str(number) / "properties").write_text(text)
        (dri / f"renderD{minor}").touch()
        device = root / f"sys/class/drm/renderD{minor}/device"
        device.mkdir(parents=True)
        for name, value in (("total", total), ("used", used)):
            if value is not None:
                (device / f"mem_info_vram_{name}").write_text(f"{value}\n")
    return root


@pytest.fixture
def rocm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(tmp_path / "site", "hip", monkeypatch)


@pytest.mark.parametrize("build", BUILDS)
def test_torch_s_build_is_read_without_importing_it(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(tmp_path, build, monkeypatch)
    assert torch_build() == build
    (tmp_path / "torch/version.py").unlink()
    assert torch_build() == "cuda", "as the wheels of PyPI are"


@pytest.mark.usefixtures("rocm")
def test_two_cards_in_rocm_s_order_not_drm_s(tmp_path: Path) -> None:
    found = find_gpus(Settings(), machine(tmp_path, MI300, RX7900))
    assert found == (
        GPU(0, "AMD gfx942", 192 * GIB, 190 * GIB, (9, 4)),
        GPU(1, "AMD gfx1100", 24 * GIB, 23 * GIB, (11, 0)),
    )
    places = _gpu_places(Devices(8, GIB, GIB, found), Settings(device="cuda:1"), RunnerOptions())
    assert [place.device for place in places] == ["cuda:1"]


@pytest.mark.usefixtures("rocm")
def test_nodes_are_counted_not_spelled(tmp_path: Path) -> None:
    """Node 10 is after node 9."""
    cards = [(i, 90010, (10 + i) * GIB, 0, 128 + i) for i in range(12)]
    assert [gpu.total // GIB for gpu in find_gpus(Settings(), machine(tmp_path, *cards))] == list(range(10, 22))


@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (APU, "cuda:0 (AMD gfx1151) has 512 MiB of its own"),
        ((1, 90402, None, None, 131), "does not tell the memory of cuda:0"),
        ((1, 90402, 64 * GIB, None, 131), "does not tell the memory of cuda:0"),
        ((1, 80003, 16 * GIB, 0, 131), "cuda:0 (AMD gfx803) is too old"),
    ],
)
def test_a_card_that_cannot_be_used_keeps_its_number(
    card: Card, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ROCm counts it all the same."""
    root = machine(tmp_path, card, RX7900)
    assert [(gpu.index, gpu.name) for gpu in find_gpus(Settings(), root)] == [(1, "AMD gfx1100")]
    find_gpus(Settings(), root)
    assert len(caplog.records) == 1 and reason in caplog.text


@pytest.mark.usefixtures("rocm")
def test_a_card_that_cannot_be_opened_has_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = machine(tmp_path, MI300, RX7900)
    (root / "dev/dri/renderD129").unlink()
    assert [(gpu.index, gpu.name) for gpu in find_gpus(Settings(), root)] == [(0, "AMD gfx1100")]
    assert "/dev/dri/renderD129 cannot be opened" in caplog.text
    (root / "dev/kfd").unlink()
    assert find_gpus(Settings(), root) == ()
    assert "/dev/kfd cannot be opened (its groups are often render and video): models run on the CPU" in caplog.text


@pytest.mark.usefixtures("rocm")
def test_garbage_in_sysfs_is_no_gpu(tmp_path: Path) -> None:
    root = machine(tmp_path, MI300, (*MI300[:4], 140), (*MI300[:4], 141), RX7900)
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    (nodes / "2/properties").write_text("drm_render_minor\n\n???\ngfx_target_version x\n")
    (nodes / "3/gpu_id").write_text("")
    (nodes / "4/properties").unlink()
    (nodes / "9x").write_text("")
    assert [gpu.name for gpu in find_gpus(Settings(), root)] == ["AMD gfx1100"]
    (root / "sys/class/drm/renderD128/device/mem_info_vram_total").write_text("-")
    assert find_gpus(Settings(), root) == () == find_gpus(Settings(), tmp_path / "nothing")


@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize(
    ("settings", "totals"),
    [
        (Settings(), [192, 24, 48]),
        (Settings(hip_visible_devices="2,0"), [48, 192]),
        (Settings(cuda_visible_devices="1"), [24]),
        (Settings(cuda_visible_devices="1", hip_visible_devices="2"), [48]),
        (Settings(rocr_visible_devices="2,1"), [48, 24]),
        (Settings(rocr_visible_devices="2,1", hip_visible_devices="1"), [24]),  # HIP numbers what ROCR shows
        (Settings(rocr_visible_devices="GPU-00000000000000b2"), [24]),
        (Settings(rocr_visible_devices="GPU-00000000000000C3,0"), [48, 192]),
        (Settings(rocr_visible_devices="0,GPU-dead,1"), [192]),
        (Settings(rocr_visible_devices=""), []),
        (Settings(hip_visible_devices="-1"), []),
        (Settings(hip_visible_devices="0,0"), []),
    ],
)
def test_visible_variables(settings: Settings, totals: list[int], tmp_path: Path) -> None:
    found = find_gpus(settings, machine(tmp_path, MI300, RX7900, (0xC3, 110000, 48 * GIB, 0, 130)))
    assert [gpu.total // GIB for gpu in found] == totals
    assert [gpu.index for gpu in found] == list(range(len(totals)))


@pytest.mark.parametrize(("build", "said"), [("cpu", "CPUs alone"), ("cuda", "NVIDIA's"), ("xpu", "Intel's")])
def test_amd_s_need_torch_for_rocm(
    build: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_torch(tmp_path / "site", build, monkeypatch)
    assert find_gpus(Settings(), machine(tmp_path, MI300)) == ()
    assert f"there is an AMD GPU, but this PyTorch is built for {said}: models run on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("build", "visible", "count"), [("cuda", None, 1), ("cuda", "MIG-4b", 0), ("cpu", None, 0), ("hip", None, 0)]
)
def test_nvidia_s_need_torch_for_cuda(
    build: str,
    visible: str | None,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine would end with "Torch not compiled with CUDA enabled"; and a part of a GPU is refused aloud."""
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
    install_torch(tmp_path, build, monkeypatch)
    assert [gpu.name for gpu in find_gpus(Settings(cuda_visible_devices=visible), tmp_path)] == ["NVIDIA H100"] * count
    assert (": models run on the CPU" in caplog.text) == (not count)
    assert ("MIG-4b is a part of a GPU" in caplog.text) == (visible is not None)


@pytest.mark.parametrize(
    ("value", "numbers", "said"),
    [
        (None, [0, 1, 2], ""),
        ("", [], ""),
        ("-1", [], ""),
        ("2,0", [2, 0], ""),
        ("0, 7, 1", [0], "7 is no GPU"),
        ("GPU-b", [1], ""),
        ("GPU-", [], "GPU- is not one GPU"),
        ("GPU-c1,0", [2, 0], ""),
        ("1,1", [], "second time"),
        ("0,MIG-GPU-a1/1/0,1", [0], "MIG"),
    ],
)
def test_a_variable_s_gpus(value: str | None, numbers: list[int], said: str) -> None:
    found, reason = chosen("V", value, ["GPU-a1", "GPU-b1", "GPU-c1"])
    assert found == numbers and said in reason and bool(said) == bool(reason)


@pytest.mark.parametrize("vendor", ["cuda", "hip", "rocr"])
def test_an_empty_variable_is_not_an_absent_one(vendor: str) -> None:
    name = f"{vendor}_visible_devices"
    assert getattr(load({name.upper(): ""}), name) == ""
    assert getattr(load({}), name) is None
