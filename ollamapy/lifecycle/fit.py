"""How a model fits devices: who holds which layers, and what room that leaves for KV. Bytes in, a Placement out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from ollamapy.cores import MAX_THREADS
from ollamapy.engine.groups import blocks_of, group_size, layer_groups, most_tokens
from ollamapy.engine.protocol import KVType, LayerGroup, LayerSpan, Plan
from ollamapy.env import Settings
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.sizes import Beside, WeightBytes
from ollamapy.models.config import ModelConfig

Kind = Literal["cpu", "cuda"]
BLOCK_SIZE = 16
# KV room, in full contexts, when OLLAMA_NUM_PARALLEL does not say: enough that a small model serves many short chats at
# once, and no more than that share of the memory that weights and workspace leave. A CPU touches blocks only as they
# are first used; a GPU allocates them all.
MAX_CONTEXTS = {"cpu": 8, "cuda": 32}
KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
GPU_RESERVE = 457 << 20  # left free on each GPU, as Ollama does
BASE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of a process: interpreter and torch; a CUDA context with its libraries
KV_BLOCKS: dict[KVType, tuple[int, int]] = {  # bytes, elements
    "f16": (2, 1),
    "bf16": (2, 1),
    "f32": (4, 1),
    "q8_0": (34, 32),
    "fp8": (1, 1),
}
_BATCHES = ((32768, 2048), (4096, 1024), (0, 512))  # context above -> tokens per step


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan, the bytes it is expected to take, and what the user should know about it."""

    plan: Plan
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    notes: tuple[str, ...] = ()
    spilled: bool = False  # on the CPU, or partly, because no GPU has room

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """A device that may be chosen: torch's name of it and the bytes that may be used there."""

    device: str
    free: int
    fp8: bool = False

    @property
    def kind(self) -> Kind:
        return "cpu" if self.device == "cpu" else "cuda"


Parts = Sequence[tuple[Place, range]]
"""Places in the order of their layers. The last has the embedding, the head and the sampling too."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is to be placed. `weights`: device kind -> bytes."""

    config: ModelConfig
    weights: Mapping[str, WeightBytes]
    settings: Settings
    options: RunnerOptions
    kv_dtype: KVType
    precise: bool
    path: str
    draft: Beside | None

    def batch_tokens(self, context: int) -> int:
        return self.options.num_batch or next(tokens for above, tokens in _BATCHES if context > above)

    def longest(self, context: int) -> int:
        """What a request to an engine of this context may ever set its own to: there factors of rope are chosen at the load."""
        trained, scaling = self.config.context_length or context, self.config.ropes[0].scaling
        chosen = scaling.type in ("none", "longrope") and context <= scaling.original_context_length
        return max(context, min(trained, scaling.original_context_length) if chosen else trained)

    def groups(self, context: int) -> tuple[LayerGroup, ...]:
        """Layers whose windows are shorter than the context give their older blocks back, where all layers have equal heads."""
        config = self.config
        shapes = set(zip(config.num_kv_heads, config.key_length, config.value_length, strict=True))
        return layer_groups(config.windows, self.longest(context)) if config.causal and len(shapes) == 1 else ()

    def layer_bytes(self, layer: int) -> int:
        """KV bytes of one token."""
        config, (nbytes, elements) = self.config, KV_BLOCKS[self.kv_dtype]
        lengths = (config.key_length[layer], config.value_length[layer])
        return config.num_kv_heads[layer] * sum(length // elements * nbytes for length in lengths)

    def block_bytes(self, layers: range, groups: Sequence[LayerGroup]) -> int:
        """Of one KV block on a place that has these layers."""
        whole = BLOCK_SIZE * sum(map(self.layer_bytes, layers))
        return whole // len(layers) * group_size(groups, len(layers)) if groups else whole

    def context_blocks(self, context: int, groups: Sequence[LayerGroup]) -> int:
        """Blocks that one sequence of a full context holds at most."""
        windows = [group.window for group in groups] or [0]
        return blocks_of(context, windows, BLOCK_SIZE, self.batch_tokens(context))

    def draft_bytes(self, context: int) -> int:
        """Of a draft model's KV cache for one context."""
        if self.draft is None:
            return 0
        return -(-context // BLOCK_SIZE) * BLOCK_SIZE * self.draft.config.kv_bytes_per_token(*KV_BLOCKS[self.kv_dtype])

    def workspace_bytes(self, kind: Kind, context: int) -> int:
        """Process, activations (some 24 float32 rows of the embedding's width per token) and logits (4 rows per sequence)."""
        rows = 24 * self.batch_tokens(context) * self.config.embedding_length
        logits = 4 * MAX_NUM_SEQS[kind] * self.config.vocab_size
        return BASE_BYTES[kind] + 4 * (rows + logits)

    def weight_bytes(self, place: Place, layers: range, is_last: bool) -> int:
        weights = self.weights[place.kind]
        draft = self.draft.weights[place.kind].total if self.draft is not None else 0
        return sum(weights.layers[layers.start : layers.stop]) + (weights.rest + draft if is_last else 0)

    def held_by(self, places: Iterable[Place]) -> tuple[Model, tuple[str, ...]]:
        """With a KV cache that all of them can have, and a note when that is not the one asked for."""
        unfit = [place.device for place in places if not place.fp8] if self.kv_dtype == "fp8" else []
        if not unfit:
            return self, ()
        why = f"{unfit[0]} has no fp8, NVIDIA's GPUs from compute capability 8.9 on do"
        return replace(self, kv_dtype="f16"), (
            f"OLLAMA_KV_CACHE_TYPE={self.settings.kv_cache_type}: {why}: the KV cache is f16",
        )

    def need(self, place: Place, context: int) -> int:
        """Bytes of all of it with one context on one place."""
        layers, groups = range(self.config.block_count), self.groups(context)
        kv = self.context_blocks(context, groups) * self.block_bytes(layers, groups) + self.draft_bytes(context)
        return self.weight_bytes(place, layers, True) + self.workspace_bytes(place.kind, context) + kv

    def on(self, parts: Parts, context: int, cpu_cores: int) -> Placement | None:
        """None when some place has no room for what it gets with one context."""
        last = parts[-1][0]
        groups = self.groups(context) if len(parts) == 1 else ()  # groups share tensors, which lie on one device
        blocks = self.context_blocks(context, groups)
        weights, workspace, kv, fitting = 0, 0, 0, []
        for number, (place, layers) in enumerate(parts):
            is_last = number == len(parts) - 1
            own = self.weight_bytes(place, layers, is_last)
            work = self.workspace_bytes(place.kind, context)
            per_context = blocks * self.block_bytes(layers, groups) + (self.draft_bytes(context) if is_last else 0)
            left = place.free - own - work
            if per_context > left:
                return None
            fitting += [int(left * KV_SHARE[place.kind]) // per_context] if per_context else []
            weights, workspace, kv = weights + own, workspace + work, kv + per_context
        wanted = self.settings.num_parallel or MAX_CONTEXTS[last.kind]
        count = max(1, min([wanted, *fitting]))
        short = f"OLLAMA_NUM_PARALLEL={wanted} does not fit: KV room for {count} contexts"
        notes = (short,) if self.settings.num_parallel and count < wanted else ()
        windows = [group.window for group in groups] or [0]
        most = most_tokens(self.longest(context), count * blocks, windows, BLOCK_SIZE, self.batch_tokens(context))
        spans = tuple(LayerSpan(place.device, len(layers)) for place, layers in parts) if len(parts) > 1 else ()
        made = Plan(
            model_path=self.path,
            draft_path=self.draft.path if self.draft is not None else "",
            num_draft_blocks=count * -(-context // BLOCK_SIZE) if self.draft is not None else 0,
            device=last.device,
            spans=spans,
            kv_dtype=self.kv_dtype,
            block_size=BLOCK_SIZE,
            num_blocks=count * blocks,
            context_length=context,
            max_context=max(context, most),
            max_num_seqs=min(MAX_NUM_SEQS[last.kind], self.batch_tokens(context)),
            max_batch_tokens=self.batch_tokens(context),
            num_threads=self.options.num_thread or min(cpu_cores, MAX_THREADS),
            kernels=self.settings.kernels,
            groups=groups,
            precise=self.precise,
            least_blocks=blocks if last.kind == "cuda" else 0,
            most_blocks=wanted * blocks if last.kind == "cuda" else 0,
            reserve_bytes=self.settings.gpu_overhead + GPU_RESERVE,
            cuda_graphs=self.settings.cuda_graphs,
            overlap=self.settings.overlap,
            prefix_folder=str(self.settings.cache_folder / "prefixes") if self.settings.prefix_cache_bytes else "",
            prefix_bytes=self.settings.prefix_cache_bytes,
        )
        return Placement(made, weights, count * kv, workspace, notes)

    def shared_out(self, gpus: Sequence[Place], layers: range, context: int) -> list[tuple[Place, range]]:
        """Layers over GPUs, the last of which has the head: in proportion to the bytes that each has for layers."""
        room = [place.free - self.workspace_bytes(place.kind, context) for place in gpus]
        room[-1] -= self.weight_bytes(gpus[-1], range(0), True) + self.draft_bytes(context)
        total = sum(max(0, each) for each in room) or 1
        ends = [round(len(layers) * each / total) for each in accumulate(max(0, each) for each in room)]
        starts = [0, *ends[:-1]]
        cut = [layers[start:end] for start, end in zip(starts, ends, strict=True)]
        return [(place, part) for place, part in zip(gpus, cut, strict=True) if len(part) or place is gpus[-1]]
