"""Which GPUs there are, as the installed PyTorch numbers them. Asks NVML and sysfs, never torch; knows nothing of placement.

Intel's are not looked for: neither of their drivers tells the size of a GPU's memory in sysfs (xe did before Linux 6.8, until
"drm/xe: Remove vram size info from sysfs").
"""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from ollamapy.env import Settings

log = logging.getLogger(__name__)
_warn_once = functools.cache(log.warning)  # devices are asked for at every load

INTEGRATED = 1 << 30  # bytes: an AMD GPU with less memory of its own is part of a CPU, and not used; Ollama's rule and number
OLDEST_GFX = 9  # Vega: Ollama's
BUILT_FOR = {"cpu": "CPUs alone", "cuda": "NVIDIA's", "hip": "AMD's", "xpu": "Intel's"}
_KFD, _RENDER = "sys/class/kfd/kfd/topology/nodes", "sys/class/drm/renderD{}/device"


@dataclass(frozen=True, slots=True)
class GPU:
    """`cuda:<index>` of torch, NVIDIA's (in PCI bus order) and AMD's (in ROCm's); bytes; (9, 0) is sm_90, (9, 4) gfx942."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]

    @property
    def fp8(self) -> bool:
        """Whether it converts float8_e4m3fn: NVIDIA's do from 8.9 on; of AMD's some have another form of it."""
        return self.capability >= (8, 9) and not self.name.startswith("AMD")


Found = tuple[list[GPU], list[str]]  # and why others are not used


def find_gpus(settings: Settings, root: Path = Path("/")) -> tuple[GPU, ...]:
    """GPUs that the installed torch can use. Why others are left out is logged, once. `root` is where sys and dev lie."""
    build = torch_build()
    usable, unusable = [], []
    for vendor, needs, (gpus, reasons) in (("NVIDIA", "cuda", nvidia(settings)), ("AMD", "hip", amd(settings, root))):
        if build == needs:
            usable += gpus
            unusable += reasons
        elif gpus:
            unusable.append(f"there is an {vendor} GPU, but this PyTorch is built for {BUILT_FOR[build]}")
    for reason in unusable:
        _warn_once(reason if usable else f"{reason}: models run on the CPU")
    return tuple(usable)


def torch_build() -> str:
    """What the installed torch is built for, a key of BUILT_FOR, as its version.py has it; "cuda" when that cannot be read."""
    spec = PathFinder.find_spec("torch")
    try:
        text = (Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
    except OSError:
        text = ""
    named = re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", text, re.MULTILINE)
    return named[1] if named else "cpu" if text else "cuda"


def nvidia(settings: Settings) -> Found:
    try:
        import pynvml
    except ImportError:
        missing = "there is an NVIDIA GPU, but nvidia-ml-py is not installed"
        return [], [missing] if Path("/dev/nvidia0").exists() else []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no GPU
        return [], []
    gpus = []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        numbers, reason = chosen(
            "CUDA_VISIBLE_DEVICES", settings.cuda_visible_devices, [_text(pynvml.nvmlDeviceGetUUID(each)) for each in handles]
        )
        for index, handle in enumerate(handles[number] for number in numbers):
            memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle), _text(pynvml.nvmlDeviceGetName(handle))
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(GPU(index, name, int(memory.total), int(memory.free), (int(major), int(minor))))
    except pynvml.NVMLError as error:
        return [], [f"NVIDIA's GPUs cannot be queried ({error})"]
    finally:
        pynvml.nvmlShutdown()
    return gpus, [reason] if reason else []


def amd(settings: Settings, root: Path) -> Found:
    """From the topology of the kernel's amdkfd, in whose order ROCm counts; memory from the amdgpu device of that render node.

    ROCm does not count nodes that it may not open; the others that cannot be used keep their number.
    """
    nodes, reasons = [], []
    for folder in sorted((root / _KFD).glob("[0-9]*"), key=lambda folder: (len(folder.name), folder.name)):
        try:
            if int((folder / "gpu_id").read_text()) == 0:  # a CPU
                continue
            pairs = (line.split() for line in (folder / "properties").read_text().splitlines())
            node = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
            minor = node["drm_render_minor"]
        except (OSError, ValueError, KeyError):  # another container's, which the kernel hides, or no GPU at all
            continue
        shut = [f"/{path}" for path in ("dev/kfd", f"dev/dri/renderD{minor}") if not os.access(root / path, os.R_OK | os.W_OK)]
        if shut:
            reasons.append(f"there is an AMD GPU, but {shut[0]} cannot be opened (its groups are often render and video)")
        else:
            nodes.append(node)
    uuids = [f"GPU-{node['unique_id']:016x}" if node.get("unique_id") else "" for node in nodes]
    numbers, reason = chosen("ROCR_VISIBLE_DEVICES", settings.rocr_visible_devices, uuids)
    second = ("HIP_VISIBLE_DEVICES", settings.hip_visible_devices)
    if settings.hip_visible_devices is None:
        second = ("CUDA_VISIBLE_DEVICES", settings.cuda_visible_devices)
    places, other = chosen(*second, [uuids[number] for number in numbers])
    reasons += [each for each in (reason, other) if each]
    made = [_amd_gpu(index, nodes[numbers[place]], root) for index, place in enumerate(places)]
    return [gpu for gpu in made if isinstance(gpu, GPU)], reasons + [why for why in made if isinstance(why, str)]


def _amd_gpu(index: int, node: dict[str, int], root: Path) -> GPU | str:
    """Or why it is not used."""
    version = node.get("gfx_target_version", 0)  # 90402 is gfx942, 90010 gfx90a
    major, minor = version // 10000, version // 100 % 100
    name = f"AMD gfx{major}{minor:x}{version % 100:x}"
    device = root / _RENDER.format(node["drm_render_minor"])
    try:
        total, used = (int((device / f"mem_info_vram_{each}").read_text()) for each in ("total", "used"))
    except (OSError, ValueError):
        return f"the driver does not tell the memory of cuda:{index} ({name}): it is not used"
    if major < OLDEST_GFX:
        return f"cuda:{index} ({name}) is too old: it is not used"
    if total < INTEGRATED:
        return f"cuda:{index} ({name}) has {total >> 20} MiB of its own, as integrated GPUs have: it is not used"
    return GPU(index, name, total, max(0, total - used), (major, minor))


def chosen(variable: str, value: str | None, uuids: list[str]) -> tuple[list[int], str]:
    """Numbers of the GPUs that a variable shows, in its order, and what of it is not obeyed.

    As CUDA and ROCm do, the list ends at the first bad entry; a negative one is how users say "no more".
    """
    if value is None:
        return list(range(len(uuids))), ""
    numbers: list[int] = []
    for entry in (part.strip() for part in value.split(",")):
        matches = [i for i, uuid in enumerate(uuids) if entry and uuid.lower().startswith(entry.lower())]
        if entry.isdecimal() and int(entry) < len(uuids):
            matches = [int(entry)]
        if entry.upper().startswith("MIG-"):
            return numbers, f"{variable}: {entry} is a part of a GPU (MIG); models are placed on whole ones, so it is not used"
        if len(matches) != 1:
            silent = not entry or entry.startswith("-") or not uuids
            return (
                numbers,
                "" if silent else f"{variable}: {entry} is {'not one GPU' if matches else 'no GPU'}: the list ends",
            )
        if matches[0] in numbers:  # CUDA: makes none visible
            return [], f"{variable}: {entry} names a GPU for the second time, which shows none"
        numbers += matches
    return numbers, ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
