"""One loaded model: its engine, who uses it, when it may go. Decides nothing about other models."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ollamapy.engine.protocol import MAX_ADAPTERS, EngineInfo
from ollamapy.lifecycle.files import ModelFile
from ollamapy.lifecycle.fit import Placement
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.sizes import adapter_bytes
from ollamapy.lifecycle.spawner import Spawner
from ollamapy.models.config import ModelConfig
from ollamapy.names import ModelName
from ollamapy.tokenizer import Tokenizer

MAX_KEEP_ALIVE = 10 * 365 * 86400.0  # seconds; above it is forever (and would overflow a datetime)


class ModelLike(Protocol):
    """What is asked of a model; `store.LocalModel` has it."""

    @property
    def name(self) -> ModelName: ...
    @property
    def digest(self) -> str: ...
    @property
    def model_path(self) -> Path | None: ...
    @property
    def adapter_paths(self) -> Sequence[Path]: ...
    @property
    def draft_path(self) -> Path | None: ...


M = TypeVar("M", bound=ModelLike)
Key = tuple[str, str]  # paths of the weights and of the draft model: names with the same ones share an engine


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[M]):
    """What a request works with. `model` is the one it asked for, of which others may share the engine."""

    model: M
    engine: EngineProcess
    tokenizer: Tokenizer
    config: ModelConfig
    metadata: Mapping[str, Any]  # of the GGUF, without its vocabulary
    context_length: int  # of a request that sets itself none
    max_context: int  # that it may set
    load_ns: int  # from the request for the model until it could be used


@dataclass(frozen=True, slots=True)
class Running:
    """A loaded model as `ps` shows it. `size` is measured: weights and KV cache as the engine holds them. Those of adapters are
    known from their files."""

    name: ModelName
    model: Any  # as it was given to `use` when it was loaded
    digest: str
    size: int
    size_vram: int
    expires_at: datetime | None  # None: never
    context_length: int
    num_requests: int
    resident_bytes: int  # of the engine's process; on a CPU, KV blocks not yet used are not in it
    info: EngineInfo
    notes: tuple[str, ...]  # where the placement differs from what was asked for
    engine: EngineProcess


class Resident:
    """A loaded model. `users` counts requests, `retiring` those who wait to end it; no user is added while they do."""

    def __init__(
        self,
        model: ModelLike,
        engine: EngineProcess,
        tokenizer: Tokenizer,
        file: ModelFile,
        placement: Placement,
        made_for: RunnerOptions,
    ) -> None:
        self.model, self.engine, self.tokenizer, self.file = model, engine, tokenizer, file
        self.placement, self.made_for = placement, made_for
        self.adapters: OrderedDict[Path, int] = OrderedDict()  # their bytes, the last one used at the end
        self.users = 0
        self.retiring = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.keep_alive = 0.0
        self.last_used = time.monotonic()
        self.closing: asyncio.Task[None] | None = None
        self._expires_at: datetime | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def start(
        cls, spawner: Spawner, model: ModelLike, file: ModelFile, placement: Placement, made_for: RunnerOptions, timeout: float
    ) -> Resident:
        """Its engine started and its tokenizer built. `timeout`: seconds without progress. Cancelling it leaves nothing behind.

        Raises EngineError, or what the engine or the tokenizer reports.
        """
        engine = await EngineProcess.start(spawner, placement.plan, load_timeout=timeout)
        try:
            tokenizer = await asyncio.shield(file.tokenizer)
            if not engine.alive:  # it died while the tokenizer was built
                raise engine.end_reason()
        except BaseException:
            await engine.close()
            raise
        return cls(model, engine, tokenizer, file, placement, made_for)

    @property
    def on_gpu(self) -> bool:
        return self.placement.plan.device != "cpu"

    @property
    def gpu_layers(self) -> int:
        """How many of the model's layers are on GPUs."""
        plan, layers = self.placement.plan, self.file.config.block_count
        if not plan.spans:
            return layers if self.on_gpu else 0
        return sum(span.num_layers for span in plan.spans if span.device != "cpu")

    def serves(self, wanted: RunnerOptions) -> bool:
        """Whether a request with these options can run on this engine; choices left open never need another."""
        plan, trained = self.placement.plan, self.file.config.context_length
        num_ctx = min(wanted.num_ctx or 0, trained) if trained else wanted.num_ctx or 0
        main = int(plan.device.partition(":")[2] or 0) if self.on_gpu else wanted.main_gpu
        return (
            num_ctx <= max(plan.max_context, plan.context_length)
            and self._has_on_gpus(wanted.num_gpu)
            and wanted.main_gpu in (None, main)
            and wanted.num_batch in (None, plan.max_batch_tokens)
            and wanted.num_thread in (None, plan.num_threads)
            and wanted.precise in (None, plan.precise)
        )

    def _has_on_gpus(self, num_gpu: int | None) -> bool:
        """A model that has fewer layers there than were asked for need not be loaded again to see that there is no room."""
        asked, here = self.made_for.num_gpu, self.gpu_layers
        if num_gpu is None or num_gpu == asked or min(num_gpu, self.file.config.block_count) == here:
            return True
        return num_gpu > here and (asked is None or asked > here)

    def add_users(self, count: int) -> None:
        self.users += count
        self.idle.clear()
        self.stop_timer()

    def set_keep_alive(self, seconds: float | None) -> None:
        """None keeps what it is; negative is forever."""
        if seconds is not None:
            self.keep_alive = math.inf if seconds < 0 or seconds > MAX_KEEP_ALIVE else seconds

    def remove_user(self) -> bool:
        """Whether it was the last one."""
        assert self.users > 0
        self.users -= 1
        self.last_used = time.monotonic()
        if self.users == 0:
            self.idle.set()
        return self.users == 0

    def start_timer(self, expire: Callable[[], None]) -> None:
        """Calls `expire` after keep_alive, unless a user comes before."""
        self.stop_timer()
        if self.keep_alive < math.inf:
            self._expires_at = self._in_keep_alive()
            self._timer = asyncio.get_running_loop().call_later(self.keep_alive, expire)

    def stop_timer(self) -> None:
        self._expires_at = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _in_keep_alive(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.keep_alive)

    @property
    def expires_at(self) -> datetime | None:
        """None: never. While it is in use: as if the last user left now."""
        return None if self.keep_alive == math.inf else self._expires_at or self._in_keep_alive()

    @property
    def adapter_bytes(self) -> int:
        """Of the adapters that requests came with, as far as the engine keeps them."""
        return sum(self.adapters.values())

    def unused_bytes(self) -> int:
        """Memory that it may still take on this machine: KV blocks of a CPU engine are only taken when first used."""
        info = self.engine.info
        adapters = 0 if self.on_gpu else self.adapter_bytes
        return max(0, info.weight_bytes + info.kv_bytes + adapters - info.vram_bytes - self.engine.memory())

    def loaded(self, model: M, load_ns: int) -> LoadedModel[M]:
        file, info = self.file, self.engine.info
        for path in model.adapter_paths:
            self.adapters[path] = self.adapters.pop(path, 0) or adapter_bytes(path)
        while len(self.adapters) > MAX_ADAPTERS:
            self.adapters.popitem(last=False)
        lengths = info.context_length, info.max_context or info.context_length
        return LoadedModel(model, self.engine, self.tokenizer, file.config, file.metadata, *lengths, load_ns)

    def running(self) -> Running:
        info = self.engine.info
        return Running(
            name=self.model.name,
            model=self.model,
            digest=self.model.digest,
            size=info.weight_bytes + info.kv_bytes + self.adapter_bytes,
            size_vram=info.vram_bytes + (self.adapter_bytes if self.on_gpu else 0),
            expires_at=self.expires_at,
            context_length=info.context_length,
            num_requests=self.users,
            resident_bytes=self.engine.memory(),
            info=info,
            notes=self.placement.notes,
            engine=self.engine,
        )


class Load:
    """A load under way and how many requests wait for it. When it is done, each of them has been added as a user."""

    def __init__(self) -> None:
        self.waiters = 0
        self.task: asyncio.Task[Resident]
