"""Where a model runs and how much context it gets: numbers in, a Placement out. Reads no file, asks no device, keeps no state.

The rules are Ollama's where it has some: one GPU that holds all of it, else several, else layers on the GPUs and the others on
the CPU, else the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ollamapy.engine.protocol import KVType
from ollamapy.env import Settings
from ollamapy.errors import EngineError
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.fit import GPU_RESERVE, KV_BLOCKS, Model, Parts, Place, Placement
from ollamapy.lifecycle.gpus import GPU
from ollamapy.lifecycle.options import MIN_CONTEXT, RunnerOptions
from ollamapy.lifecycle.sizes import Beside, WeightBytes
from ollamapy.models.config import ModelConfig

GIB = 1 << 30
_KV_NAMES = {"": "f16", "fp8_e4m3": "fp8"}  # vLLM has both names for it
AUTO_CONTEXT = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))  # total GPU memory -> default context


class DoesNotFit(EngineError):
    """Not even one context fits; it may once other models are unloaded."""


def plan(
    config: ModelConfig,
    weights: Mapping[str, WeightBytes],
    devices: Devices,
    settings: Settings,
    options: RunnerOptions,
    model_path: str = "",
    draft: Beside | None = None,
) -> Placement:
    """Where the model goes, with as much KV room as is sensible. `weights`: device kind -> bytes, see `sizes.weight_bytes`.

    A context that nobody asked for is lowered until the GPUs hold all layers with it; one that was asked for stays, and then
    layers go to the CPU. `num_gpu` layers go to the GPUs when it is fewer than all; OLLAMA_SCHED_SPREAD uses all GPUs at once.
    Raises DoesNotFit, and EngineError when a device is forced that is not there.
    """
    precise = settings.precise if options.precise is None else options.precise
    kv_dtype, notes = kv_type(settings.kv_cache_type, (config, *([draft.config] if draft else [])), precise)
    model = Model(config, weights, settings, options, kv_dtype, precise, model_path, draft)
    gpus, cpu = _gpu_places(devices, settings, options), Place("cpu", devices.free_memory)
    lengths = contexts(config, devices.gpus, settings, options)
    for parts, context in _candidates(model, gpus, cpu, lengths):
        placement = _placed(model, parts, context, devices.cpu_cores)
        if placement is not None:
            on_cpu = sum(len(layers) for place, layers in parts if place is cpu)
            told = [*notes, *_split_notes(parts, on_cpu, settings, options), *placement.notes]
            return replace(placement, notes=tuple(told), spilled=on_cpu > 0 and options.num_gpu is None)
    if gpus and _must_be_gpu(settings):
        raise _does_not_fit(model, gpus[0], lengths[-1])
    if gpus:
        notes.append(f"does not fit on a GPU (the most free memory is {_size(gpus[0].free)}): runs on the CPU")
    candidates = contexts(config, (), settings, options)
    for context in candidates:
        placement = _placed(model, [(cpu, range(config.block_count))], context, devices.cpu_cores)
        if placement is not None:
            return replace(placement, notes=(*notes, *placement.notes), spilled=bool(gpus))
    raise _does_not_fit(model, cpu, candidates[-1])


def _placed(model: Model, parts: Parts, context: int, cpu_cores: int) -> Placement | None:
    held, notes = model.held_by(place for place, _ in parts)
    placement = held.on(parts, context, cpu_cores)
    return replace(placement, notes=(*notes, *placement.notes)) if placement is not None else None


Candidate = tuple[list[tuple[Place, range]], int]


def _candidates(model: Model, gpus: Sequence[Place], cpu: Place, lengths: Sequence[int]) -> Iterator[Candidate]:
    """Ways to use the GPUs, best first: the layers of each place, and a context."""
    if not gpus:
        return
    all_layers, wanted = range(model.config.block_count), model.options.num_gpu
    several = list(reversed(gpus))  # the one with the most room is last: it has the head
    if wanted is None or wanted > len(all_layers):
        if not (model.settings.sched_spread and len(gpus) > 1):  # one with a shorter context is faster than two
            yield from (([(place, all_layers)], context) for context in lengths for place in gpus)
        if len(gpus) > 1:
            yield from ((model.shared_out(several, all_layers, context), context) for context in lengths)
        counts = range(len(all_layers) - 1, 0, -1)
    else:
        counts = range(wanted, wanted - 1, -1)
    if _must_be_gpu(model.settings) and wanted is None:
        return
    for count in counts:
        first = len(all_layers) - count
        shared = model.shared_out(several, all_layers[first:], lengths[-1])
        yield [*([(cpu, all_layers[:first])] if first else []), *shared], lengths[-1]


def _split_notes(parts: Sequence[tuple[Place, range]], on_cpu: int, settings: Settings, options: RunnerOptions) -> list[str]:
    """What a user should know of a model that is on more than one device."""
    if len(parts) == 1:
        return []
    if options.num_gpu is not None:
        why = "num_gpu"
    elif on_cpu:
        why = "the GPUs have no room for more"
    else:
        why = "OLLAMA_SCHED_SPREAD" if settings.sched_spread else "no GPU has room for all"
    return [f"layers are split ({why}): {', '.join(f'{len(layers)} on {place.device}' for place, layers in parts)}"]


def contexts(config: ModelConfig, gpus: Sequence[GPU], settings: Settings, options: RunnerOptions) -> list[int]:
    """Context lengths to try, in order; never above what the model was trained for.

    The request's (or model's), else OLLAMA_CONTEXT_LENGTH, else by the memory of all GPUs and lower steps of that.
    """
    chosen = options.num_ctx or settings.context_length
    if chosen:
        lengths = [max(MIN_CONTEXT, chosen)]
    else:
        total = sum(max(0, gpu.total - settings.gpu_overhead) for gpu in gpus)
        lengths = [length for least, length in AUTO_CONTEXT if total >= least]
    trained = config.context_length or max(lengths)
    return list(dict.fromkeys(min(length, trained) for length in lengths))


def kv_type(name: str, configs: Sequence[ModelConfig], precise: bool) -> tuple[KVType, list[str]]:
    """The KV cache's type for OLLAMA_KV_CACHE_TYPE, and a note when it is not the one asked for. fp8 is not everywhere: see
    `Model.held_by`."""
    wanted, asked = _KV_NAMES.get(name.lower(), name.lower()), f"OLLAMA_KV_CACHE_TYPE={name}"
    if precise:
        return "f32", [f"{asked}: a precise model has a KV cache of f32"] if name and wanted != "f32" else []
    chosen = next((kind for kind in KV_BLOCKS if kind == wanted), None)
    if chosen is None:
        return "f16", [f"{asked} is not supported: the KV cache is f16"]
    lengths = [length for config in configs for length in (*config.key_length, *config.value_length)]
    odd = [length for length in lengths if length % KV_BLOCKS[chosen][1]]
    return ("f16", [f"{asked}: heads of {odd[0]} are not whole blocks of 32: the KV cache is f16"]) if odd else (chosen, [])


def wants_cpu(devices: Devices, settings: Settings, options: RunnerOptions) -> bool:
    return options.num_gpu == 0 or settings.device == "cpu" or (not devices.gpus and not _must_be_gpu(settings))


def _gpu_places(devices: Devices, settings: Settings, options: RunnerOptions) -> list[Place]:
    """GPUs that may be used, the one with the most free memory first. Raises EngineError for a forced one that is not there."""
    if settings.device and not re.fullmatch(r"cpu|cuda(:\d+)?", settings.device):
        raise EngineError(f"OLLAMAPY_DEVICE={settings.device}: must be cpu, cuda or cuda:<number>")
    pinned = int(settings.device[5:]) if settings.device.startswith("cuda:") else options.main_gpu
    gpus = [gpu for gpu in devices.gpus if pinned is None or gpu.index == pinned]
    if _must_be_gpu(settings) and not gpus:
        names = ", ".join(f"cuda:{gpu.index} {gpu.name}" for gpu in devices.gpus) or "none"
        raise EngineError(f"OLLAMAPY_DEVICE={settings.device}: there is no such GPU (found: {names})")
    if wants_cpu(devices, settings, options):
        return []
    places = [Place(f"cuda:{gpu.index}", max(0, gpu.free - settings.gpu_overhead - GPU_RESERVE), gpu.fp8) for gpu in gpus]
    return sorted(places, key=lambda place: -place.free)


def _must_be_gpu(settings: Settings) -> bool:
    return settings.device.startswith("cuda")


def _does_not_fit(model: Model, place: Place, context: int) -> DoesNotFit:
    need = model.held_by([place])[0].need(place, context)
    kind = "system" if place.kind == "cpu" else "GPU"
    return DoesNotFit(
        f"model requires more {kind} memory ({_size(need)} with a context of {context} tokens) than is available "
        f"({_size(place.free)}); use a smaller num_ctx or model, or unload other models"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
