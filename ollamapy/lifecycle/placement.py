"""Where a model runs and how much context it gets: numbers in, a Plan out. Reads no file, asks no device, keeps no state.

The rules are Ollama's where it has some; the figures at the top are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ollamapy.api.options import Options
from ollamapy.engine.groups import blocks_of, group_size, layer_groups
from ollamapy.engine.protocol import KVType, LayerGroup, Plan
from ollamapy.env import Settings
from ollamapy.errors import EngineError
from ollamapy.lifecycle.devices import GPU, Devices
from ollamapy.lifecycle.sizes import Beside
from ollamapy.models.config import ModelConfig

GIB = 1 << 30
AUTO_CONTEXT = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))  # total GPU memory -> default context
MIN_CONTEXT = 4
BLOCK_SIZE = 16
# KV room, in full contexts, when OLLAMA_NUM_PARALLEL does not say: enough that a small model serves many short chats at
# once, and no more than that share of the memory that weights and workspace leave. A CPU touches blocks only as they
# are first used; a GPU allocates them all.
MAX_CONTEXTS = {"cpu": 8, "cuda": 32}
KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
BASE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of a process: interpreter and torch; a CUDA context with its libraries
GPU_RESERVE = 457 << 20  # left free on each GPU, as Ollama does
_BATCHES = ((32768, 2048), (4096, 1024), (0, 512))  # context above -> tokens per step
_KV_BLOCKS: dict[KVType, tuple[int, int]] = {"f16": (2, 1), "bf16": (2, 1), "f32": (4, 1), "q8_0": (34, 32)}  # bytes, elements


class DoesNotFit(EngineError):
    """Not even one context fits; it may once other models are unloaded."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """The options that shape an engine; None where the user leaves the choice."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    precise: bool | None = None

    @classmethod
    def of(cls, options: Options | Mapping[str, object]) -> RunnerOptions:
        """Of merged `Options`, where a default stands for no choice, or of a mapping with only what was given."""
        if isinstance(options, Options):
            options = {name: getattr(options, name) for name in cls.__dataclass_fields__}
            options["num_ctx"] = options["num_ctx"] or None  # merge() has made an explicit 0 a 4
            options["num_batch"] = None if options["num_batch"] == Options().num_batch else options["num_batch"]
        num_ctx, num_batch = _integer(options, "num_ctx"), _integer(options, "num_batch")
        num_gpu, num_thread = _integer(options, "num_gpu"), _integer(options, "num_thread")
        return cls(
            num_ctx=None if num_ctx is None else max(MIN_CONTEXT, num_ctx),
            num_batch=num_batch if num_batch is not None and num_batch > 0 else None,
            num_gpu=num_gpu if num_gpu is not None and num_gpu >= 0 else None,
            main_gpu=_integer(options, "main_gpu"),
            num_thread=num_thread if num_thread is not None and num_thread > 0 else None,
            precise=None if options.get("precise") is None else bool(options["precise"]),
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan, the bytes it is expected to take, and what the user should know about it."""

    plan: Plan
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    notes: tuple[str, ...] = ()
    spilled: bool = False  # on the CPU because no GPU has room

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """A device that may be chosen: torch's name of it and the bytes that may be used there."""

    device: str
    free: int

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.device == "cpu" else "cuda"


def plan(
    config: ModelConfig,
    weights: Mapping[str, int],
    devices: Devices,
    settings: Settings,
    options: RunnerOptions,
    model_path: str = "",
    draft: Beside | None = None,
) -> Placement:
    """The best GPU that holds the model with one full context, else the CPU, with as much KV room as is sensible.

    `weights`: device kind -> bytes, see `sizes.weight_bytes`.
    A context that nobody asked for is lowered until it fits; one that was asked for is an error when it does not.
    Raises DoesNotFit, and EngineError when a device is forced that is not there.
    """
    precise = settings.precise if options.precise is None else options.precise
    kv_dtype, notes = kv_type(settings.kv_cache_type, (config, *([draft.config] if draft else [])), precise)
    if draft is not None:
        weights = {kind: size + draft.weights[kind] for kind, size in weights.items()}
    shape = _Shape(config, weights, settings, options, kv_dtype, precise, model_path, draft)
    gpus = _gpu_places(devices, settings, options)
    for place, context in [(p, c) for c in contexts(config, devices.gpus, settings, options) for p in gpus]:
        placement = shape.on(place, context, devices.cpu_cores)
        if placement is not None:
            if options.num_gpu is not None and options.num_gpu <= config.block_count:
                notes.append(f"num_gpu={options.num_gpu}: a model is not split; all its layers run on the GPU")
            return replace(placement, notes=(*notes, *placement.notes))
    if gpus and _must_be_gpu(settings):
        raise _does_not_fit(shape, gpus[0], contexts(config, devices.gpus, settings, options)[-1])
    if gpus:
        notes.append(f"does not fit on a GPU (the most free memory is {_size(gpus[0].free)}): runs on the CPU")
    cpu = _Place("cpu", devices.free_memory)
    candidates = contexts(config, (), settings, options)
    for context in candidates:
        placement = shape.on(cpu, context, devices.cpu_cores)
        if placement is not None:
            return replace(placement, notes=(*notes, *placement.notes), spilled=bool(gpus))
    raise _does_not_fit(shape, cpu, candidates[-1])


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
    """The KV cache's type for OLLAMA_KV_CACHE_TYPE, and a note when it is not the one asked for."""
    wanted, asked = name.lower() or "f16", f"OLLAMA_KV_CACHE_TYPE={name}"
    if precise:
        return "f32", [f"{asked}: a precise model has a KV cache of f32"] if name and wanted != "f32" else []
    chosen = next((kind for kind in _KV_BLOCKS if kind == wanted), None)
    if chosen is None:
        return "f16", [f"{asked} is not supported: the KV cache is f16"]
    lengths = [length for config in configs for length in (*config.key_length, *config.value_length)]
    odd = [length for length in lengths if length % _KV_BLOCKS[chosen][1]]
    return ("f16", [f"{asked}: heads of {odd[0]} are not whole blocks of 32: the KV cache is f16"]) if odd else (chosen, [])


def wants_cpu(devices: Devices, settings: Settings, options: RunnerOptions) -> bool:
    return options.num_gpu == 0 or settings.device == "cpu" or (not devices.gpus and not _must_be_gpu(settings))


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is to be placed."""

    config: ModelConfig
    weights: Mapping[str, int]
    settings: Settings
    options: RunnerOptions
    kv_dtype: KVType
    precise: bool
    model_path: str
    draft: Beside | None

    def batch_tokens(self, context: int) -> int:
        return self.options.num_batch or next(tokens for above, tokens in _BATCHES if context > above)

    def groups(self, context: int) -> tuple[LayerGroup, ...]:
        """Layers whose windows are shorter than the context give their older blocks back, where all layers have equal heads."""
        config = self.config
        shapes = set(zip(config.num_kv_heads, config.key_length, config.value_length, strict=True))
        return layer_groups(config.windows, context) if config.causal and len(shapes) == 1 else ()

    def block_bytes(self, groups: Sequence[LayerGroup]) -> int:
        layers = len(self.config.windows)
        all_layers = self.config.kv_bytes_per_token(*_KV_BLOCKS[self.kv_dtype]) * BLOCK_SIZE
        return all_layers // layers * group_size(groups, layers) if groups else all_layers

    def context_blocks(self, context: int, groups: Sequence[LayerGroup]) -> int:
        """Blocks that one sequence of a full context holds at most."""
        windows = [group.window for group in groups] or [0]
        return blocks_of(context, windows, BLOCK_SIZE, self.batch_tokens(context))

    def draft_bytes(self, context: int) -> int:
        """Of a draft model's KV cache for one context."""
        return (
            0
            if self.draft is None
            else -(-context // BLOCK_SIZE) * BLOCK_SIZE * self.draft.config.kv_bytes_per_token(*_KV_BLOCKS[self.kv_dtype])
        )

    def context_bytes(self, context: int) -> int:
        groups = self.groups(context)
        return self.context_blocks(context, groups) * self.block_bytes(groups) + self.draft_bytes(context)

    def workspace_bytes(self, kind: str, context: int) -> int:
        """Process, activations (some 24 float32 rows of the embedding's width per token) and logits (4 rows per sequence)."""
        rows = 24 * self.batch_tokens(context) * self.config.embedding_length
        logits = 4 * MAX_NUM_SEQS[kind] * self.config.vocab_size
        return BASE_BYTES[kind] + 4 * (rows + logits)

    def on(self, place: _Place, context: int, cpu_cores: int) -> Placement | None:
        """None when not even one context fits."""
        workspace = self.workspace_bytes(place.kind, context)
        groups = self.groups(context)
        blocks, nbytes = self.context_blocks(context, groups), self.context_bytes(context)
        left = place.free - self.weights[place.kind] - workspace
        if nbytes > left:
            return None
        wanted = self.settings.num_parallel or MAX_CONTEXTS[place.kind]
        fitting = int(left * KV_SHARE[place.kind]) // nbytes if nbytes else wanted
        count = max(1, min(wanted, fitting))
        notes = (
            [f"OLLAMA_NUM_PARALLEL={wanted} does not fit: KV room for {count} contexts"]
            if (self.settings.num_parallel and count < wanted)
            else []
        )
        batch_tokens = self.batch_tokens(context)
        made = Plan(
            model_path=self.model_path,
            draft_path=self.draft.path if self.draft is not None else "",
            num_draft_blocks=count * -(-context // BLOCK_SIZE) if self.draft is not None else 0,
            device=place.device,
            kv_dtype=self.kv_dtype,
            block_size=BLOCK_SIZE,
            num_blocks=count * blocks,
            context_length=context,
            max_num_seqs=min(MAX_NUM_SEQS[place.kind], batch_tokens),
            max_batch_tokens=batch_tokens,
            num_threads=self.options.num_thread or cpu_cores,
            kernels=self.settings.kernels,
            groups=groups,
            precise=self.precise,
            prefix_folder=str(self.settings.cache_folder / "prefixes") if self.settings.prefix_cache_bytes else "",
            prefix_bytes=self.settings.prefix_cache_bytes,
        )
        return Placement(made, self.weights[place.kind], count * nbytes, workspace, tuple(notes))


def _gpu_places(devices: Devices, settings: Settings, options: RunnerOptions) -> list[_Place]:
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
    places = [_Place(f"cuda:{gpu.index}", max(0, gpu.free - settings.gpu_overhead - GPU_RESERVE)) for gpu in gpus]
    return sorted(places, key=lambda place: -place.free)


def _must_be_gpu(settings: Settings) -> bool:
    return settings.device.startswith("cuda")


def _does_not_fit(shape: _Shape, place: _Place, context: int) -> DoesNotFit:
    need = shape.weights[place.kind] + shape.workspace_bytes(place.kind, context) + shape.context_bytes(context)
    kind = "system" if place.kind == "cpu" else "GPU"
    return DoesNotFit(
        f"model requires more {kind} memory ({_size(need)} with a context of {context} tokens) than is available "
        f"({_size(place.free)}); use a smaller num_ctx or model, or unload other models"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _integer(options: Mapping[str, object], name: str) -> int | None:
    value = options.get(name)
    return int(value) if isinstance(value, int | float) else None
