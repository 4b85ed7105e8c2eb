"""The models that are loaded: loads them on demand, shares them, keeps them for a while, evicts them. No HTTP, no text.

A request holds a model by `use`. Loads happen one at a time, in the order they were asked for, while loaded models
keep serving; a load that nobody waits for any more is cancelled and its process ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from ollamapy.api.options import Options
from ollamapy.env import Settings
from ollamapy.errors import EngineError, NotFound, ServerBusy
from ollamapy.lifecycle import placement
from ollamapy.lifecycle.breaker import Breaker
from ollamapy.lifecycle.devices import Devices, wait_for_gpu_memory
from ollamapy.lifecycle.files import ModelFile, ModelFiles
from ollamapy.lifecycle.fit import Placement
from ollamapy.lifecycle.limits import Limits
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.placement import DoesNotFit
from ollamapy.lifecycle.resident import Key, Load, LoadedModel, M, ModelLike, Resident, Running
from ollamapy.lifecycle.sizes import adapter_bytes, read_beside, weight_bytes
from ollamapy.lifecycle.spawner import Spawner

log = logging.getLogger(__name__)

DRAIN = 10.0  # seconds that requests get to end when their model is stopped
PATIENCE = 600.0  # seconds that they get when another load needs the room; that load, and all behind it, wait so long
MODELS_PER_DEVICE = 3
AnyOptions = Options | Mapping[str, object]


class Residents:
    """All loaded models. Belongs to one event loop; call `start` on it before the first `use`."""

    def __init__(
        self, settings: Settings, *, discover: Callable[[], Devices] | None = None, spawner: Spawner | None = None
    ) -> None:
        self._settings = settings
        self._discover = discover or (lambda: Devices.discover(settings))
        self._spawner = spawner or Spawner()
        self._files = ModelFiles()
        self._residents: dict[Key, Resident] = {}
        self._loads: dict[Key, Load] = {}
        self._limits = Limits(settings.max_queue, settings.max_queue_per_client, time.monotonic)
        self._one_load = asyncio.Lock()  # fair: first come, first served
        self._breaker = Breaker(time.monotonic)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begins to import torch in the process that engines are forked from; returns at once."""
        self._spawner.start()

    @asynccontextmanager
    async def use(
        self, model: M, options: AnyOptions, keep_alive: float | None = None, client: str = "", weight: int = 1
    ) -> AsyncIterator[LoadedModel[M]]:
        """Loads the model if need be and holds it loaded. `keep_alive`: seconds it stays afterwards; None keeps what
        holds for it, 0 unloads it when its last request ends, negative is forever. `weight`: requests that it counts as.

        Raises ServerBusy when too many wait, of `client` or of all, OptionError, NotFound when the weights are gone, and what
        a load raises.
        """
        start = time.monotonic_ns()
        key, wanted = _key(model), RunnerOptions.of(options)
        self._check_open()
        here = self._residents.get(key)
        self._limits.enter(key, client, here.placement.plan.max_num_seqs if here else 1, weight)  # one loads, the others wait
        try:
            resident = await self._get(key, model, wanted)
            try:
                resident.set_keep_alive(keep_alive)
                yield resident.loaded(model, time.monotonic_ns() - start)
            finally:
                self._release(resident)
        finally:
            self._limits.leave(key, client, weight)

    async def metadata(self, model: ModelLike) -> Mapping[str, Any]:
        """Of the model's file, as `use` will have it. Raises NotFound, GGUFError, UnsupportedModel."""
        return (await self._open(model)).metadata

    def running(self) -> list[Running]:
        """The loaded models, the one that stays longest first."""
        rows = [resident.running() for resident in self._residents.values()]
        rows.sort(key=lambda row: row.expires_at.timestamp() if row.expires_at else float("inf"), reverse=True)
        return rows

    async def unload(self, model: ModelLike) -> bool:
        """Stops a model: its requests get up to 10 s, then they are ended. Returns, when it is gone, whether it was there.

        New requests for it wait and load it anew. Cancelling this does not stop the unloading.
        """
        resident = self._residents.get(_key(model))
        if resident is None:
            return False
        await asyncio.shield(self._spawn_task(self._retire(resident, DRAIN)))
        return True

    async def close(self) -> None:
        """Refuses new requests, gives those that run up to 10 s, and ends all processes."""
        self._closed = True
        for load in self._loads.values():
            load.task.cancel()
        await asyncio.gather(*(self._retire(resident, DRAIN) for resident in list(self._residents.values())))
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._spawner.close()

    # --- one request ---

    async def _get(self, key: Key, model: ModelLike, wanted: RunnerOptions) -> Resident:
        """A resident of which the caller has become a user."""
        resident = self._residents.get(key)
        if resident is not None and self._usable(resident, wanted):
            resident.add_users(1)
            return resident
        while True:
            resident = await self._join_load(key, model, wanted)
            if resident.serves(wanted):
                return resident
            self._release(resident)  # others wanted less; load again
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerBusy("the server is shutting down")

    def _usable(self, resident: Resident, wanted: RunnerOptions) -> bool:
        return not resident.retiring and resident.engine.alive and resident.serves(wanted)

    async def _join_load(self, key: Key, model: ModelLike, wanted: RunnerOptions) -> Resident:
        """Waits for the load of `key`, which it begins if none is under way. The caller is then a user of the resident."""
        load = self._loads.get(key)
        if load is None:
            self._breaker.check((key, wanted))
            load = self._loads[key] = Load()
            load.task = self._spawn_task(self._load(load, key, model, wanted))
        load.waiters += 1
        try:
            return await asyncio.shield(load.task)
        except asyncio.CancelledError:
            task = load.task
            if task.cancelled() and self._closed:
                raise ServerBusy("the server is shutting down") from None
            if task.done() and not task.cancelled() and task.exception() is None:
                self._release(task.result())
            load.waiters -= 1
            if not load.waiters and not task.done():
                del self._loads[key]
                task.cancel()
            raise

    def _release(self, resident: Resident) -> None:
        if resident.remove_user() and self._is_here(resident):
            if resident.keep_alive <= 0:
                self._begin_close(resident)
            else:
                resident.start_timer(lambda: self._expire(resident))

    # --- loading ---

    async def _load(self, load: Load, key: Key, model: ModelLike, wanted: RunnerOptions) -> Resident:
        try:
            async with self._one_load:
                resident = await self._loaded(key, model, wanted)
                resident.add_users(load.waiters)  # nothing is awaited from here to the waiters: it cannot be evicted before
                return resident
        finally:
            if self._loads.get(key) is load:  # not given up, and perhaps begun anew by another request
                del self._loads[key]

    async def _loaded(self, key: Key, model: ModelLike, wanted: RunnerOptions) -> Resident:
        old = self._residents.get(key)
        if old is not None and self._usable(old, wanted):
            return old
        file = await self._open(model)
        adapters = sum(await asyncio.to_thread(lambda: [adapter_bytes(path) for path in model.adapter_paths]))
        keep_alive = self._settings.keep_alive
        if old is not None:
            keep_alive = old.keep_alive
            devices = (await asyncio.to_thread(self._discover)).emptied()
            await self._plan(key, file, devices, wanted, adapters)  # options that fit no machine do not end what serves others
            await self._retire(old, PATIENCE)
        placed = await self._make_room(key, file, wanted, adapters)
        for note in placed.notes:
            log.warning("%s: %s", model.name.short(), note)
        try:
            resident = await Resident.start(self._spawner, model, file, placed, wanted, self._settings.load_timeout)
        except EngineError as error:
            self._breaker.record((key, wanted), str(error))
            raise
        resident.set_keep_alive(keep_alive)
        resident.engine.on_death = lambda: self._died(resident)
        self._residents[key] = resident
        log.info("%s: loaded on %s in %.2f s", model.name.short(), placed.plan.device, resident.engine.info.load_ns / 1e9)
        return resident

    async def _open(self, model: ModelLike) -> ModelFile:
        if model.model_path is not None:
            with suppress(FileNotFoundError):
                return await self._files.open(model.model_path)
        raise NotFound(f'model "{model.name.short()}" not found, try pulling it first')

    async def _make_room(self, key: Key, file: ModelFile, wanted: RunnerOptions, adapters: int) -> Placement:
        """A placement that fits what is free now, with so many bytes of `adapters`, after as many evictions as that takes.
        Raises DoesNotFit.

        Nothing is evicted for a model that would not fit an empty machine either.
        """
        while True:
            if self._closing:
                await asyncio.wait(self._closing)
            devices = (await asyncio.to_thread(self._discover)).without(sum(r.unused_bytes() for r in self._residents.values()))
            if len(self._residents) < (self._settings.max_loaded_models or MODELS_PER_DEVICE * max(1, len(devices.gpus))):
                try:
                    placed = await self._plan(key, file, devices, wanted, adapters)
                except DoesNotFit:
                    if not self._residents:
                        raise
                    await self._plan(key, file, devices.emptied(), wanted, adapters)
                else:
                    if not (placed.spilled and any(resident.on_gpu for resident in self._residents.values())):
                        return placed
            await self._evict(devices)

    async def _plan(self, key: Key, file: ModelFile, devices: Devices, wanted: RunnerOptions, adapters: int) -> Placement:
        packed_on = (await self._spawner.ready()).packed_on
        weights = {
            kind: size._replace(rest=size.rest + adapters)
            for kind, size in weight_bytes(file.tensors, packed_on, self._settings).items()
        }
        draft = await asyncio.to_thread(read_beside, Path(key[1]), packed_on, self._settings) if key[1] else None
        return placement.plan(file.config, weights, devices, self._settings, wanted, key[0], draft)

    # --- ending ---

    async def _evict(self, devices: Devices) -> None:
        """Ends one model: an idle one before one in use, then the one with the shortest keep_alive, then the longest unused."""
        resident = min(self._residents.values(), key=lambda r: (r.users > 0, r.keep_alive, r.last_used))
        log.info("%s: evicted to make room", resident.model.name.short())
        await self._retire(resident, PATIENCE)
        if resident.on_gpu:
            await wait_for_gpu_memory(self._discover, devices, resident.engine.info.vram_bytes)

    async def _retire(self, resident: Resident, patience: float) -> None:
        """Lets no new request in, waits for those that run, at most `patience` seconds, and ends the engine."""
        resident.retiring += 1
        try:
            await asyncio.wait_for(resident.idle.wait(), patience)
        except TimeoutError:
            log.warning("%s: stopped with %d requests in flight", resident.model.name.short(), resident.users)
        finally:
            resident.retiring -= 1
        await asyncio.shield(self._begin_close(resident))

    def _begin_close(self, resident: Resident) -> asyncio.Task[None]:
        """From now on it is not there; its process ends in the background, and the next load waits for that."""
        resident.stop_timer()
        if self._is_here(resident):
            del self._residents[_key(resident.model)]
        if resident.closing is None:
            resident.closing = self._spawn_task(resident.engine.close())
            self._closing.add(resident.closing)
            resident.closing.add_done_callback(self._closing.discard)
        return resident.closing

    def _is_here(self, resident: Resident) -> bool:
        return self._residents.get(_key(resident.model)) is resident

    def _expire(self, resident: Resident) -> None:
        log.info("%s: unloaded after its keep_alive", resident.model.name.short())
        self._begin_close(resident)

    def _died(self, resident: Resident) -> None:
        if resident.closing is None:
            self._breaker.record((_key(resident.model), resident.made_for), str(resident.engine.end_reason()))
            self._begin_close(resident)

    def _spawn_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also when nobody waits any more
        return task


def _key(model: ModelLike) -> Key:
    return str(model.model_path), str(model.draft_path or "")
