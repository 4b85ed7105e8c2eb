"""GPUs that are late: what they are given to do is done when somebody waits for it, or at a moment drawn by chance.

A tensor on `late:0`, `late:1` ... is a handle of memory that is written when its stream gets there, so that whoever reads or
overwrites too early is found: each device's work is a queue, copies between devices wait for both, as torch's do, and memory
that nobody has written holds no number. While steps are recorded, what CUDA forbids raises: reading on the host, copies from
the host, kernels that were never launched before, work on another device. Memory of recorded steps that nobody holds is
overwritten before each replay, as if the next recording had got it.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from ollamapy.engine.accelerator import Pieces, Recorded
from ollamapy.engine.batch import Move

KIND = "late"
aten = torch.ops.aten
READS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select")
TRANSFERS = ("to", "_to_copy", "copy_")

_current: list[Late] = []


def register() -> None:
    """Makes `late` a type of device of this process; torch knows nothing of it but the name."""
    from torch.utils import backend_registration

    if torch._C._get_privateuse1_backend_name() != KIND:
        backend_registration._setup_privateuseone_for_python_backend(KIND)


class _Token:
    """Alive as long as a handle of a piece of memory is."""


class Handle(Tensor):
    """A tensor on a late device."""

    memory: Tensor
    token: _Token

    @staticmethod
    def __new__(cls, memory: Tensor, device: torch.device, token: _Token) -> Handle:
        made: Handle = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=device,
        )
        return made

    def __init__(self, memory: Tensor, device: torch.device, token: _Token) -> None:
        self.memory, self.token = memory, token

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current[-1].run(func, args, kwargs or {})


@dataclass
class Stream:
    queue: deque[Callable[[], object]] = field(default_factory=deque)
    done: int = 0

    @property
    def end(self) -> int:
        """How much will be done when all that is in the queue has been."""
        return self.done + len(self.queue)

    def until(self, count: int) -> None:
        while self.done < count:
            work = self.queue.popleft()
            self.done += 1
            work()


@dataclass
class Recording:
    device: torch.device
    late: Late
    work: list[Callable[[], object]] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)  # memory of all recordings that nobody held when this one was made

    def replay(self) -> None:
        assert self.late.recording is None
        self.late.give(self.device, lambda: [poison(memory) for memory in self.free])
        for each in self.work:
            self.late.give(self.device, each)


def poison(memory: Tensor) -> None:
    memory.fill_(torch.nan if memory.is_floating_point() else 1 if memory.dtype is torch.bool else 113)


class _MakesTensors(TorchFunctionMode):
    """`torch.tensor` asks no mode for what it makes: here it makes it on the host and copies it. Pins memory, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return _current[-1].pinned(args[0].clone())
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == KIND:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


class Late(TorchDispatchMode):
    """Late devices, and the `Accelerator` of a model on them. Use as a context manager around all that touches them."""

    def __init__(self, seed: int, count: int = 1) -> None:
        super().__init__()
        register()
        self.rng = random.Random(seed)
        self.devices = tuple(torch.device(KIND, index) for index in range(count))
        self.streams = [Stream() for _ in range(count)]
        self.recording: Recording | None = None
        self.recorded: list[Pieces] = []
        self.launched: set[object] = set()
        self.num_waits = 0  # of the host for a device, but by `fetch`
        self.free = [1 << 30] * count  # bytes of each device
        self.peaks = [0] * count
        self._makes = _MakesTensors()
        self._haste = 0.0
        self._pinned: set[int] = set()
        self._pool: list[tuple[Tensor, weakref.ref[_Token]]] = []

    def __enter__(self) -> Late:
        _current.append(self)
        super().__enter__()
        self._makes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._makes.__exit__(*error)
        super().__exit__(*error)
        _current.pop()

    # --- the accelerator ---------------------------------------------------------------------------------------------

    def record(self, run: Callable[[Move], None]) -> Recorded:
        self.recorded.append(Pieces(self.devices[0], self._capture, run))
        return self.recorded[-1]

    @contextmanager
    def _capture(self, device: torch.device) -> Iterator[Recorded]:
        assert self.recording is None
        recording = self.recording = Recording(device, self)
        try:
            yield recording
        finally:
            self.recording = None
        recording.free = [memory for memory, token in self._pool if token() is None]

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.pinned(torch.empty(count, dtype=dtype).fill_(1 << 30))

    def pinned(self, memory: Tensor) -> Tensor:
        self._pinned.add(memory.data_ptr())
        weakref.finalize(memory, self._pinned.discard, memory.data_ptr())
        return memory

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        assert isinstance(tensor, Handle)
        host, stream = torch.empty(tensor.shape, dtype=tensor.dtype), self._stream(tensor.device)
        poison(host)
        self.give(tensor.device, lambda: host.copy_(tensor.memory))
        end = stream.end

        def wait() -> Tensor:
            with self._working():
                stream.until(end)
            return host

        return wait

    def release(self) -> None:
        pass

    def free_bytes(self, device: torch.device) -> int:
        return self.free[device.index]

    def reserved_bytes(self) -> int:
        return 1 << 20

    def peak_bytes(self, run: Callable[[], None]) -> list[int]:
        run()
        return self.peaks

    # --- work --------------------------------------------------------------------------------------------------------

    def _stream(self, device: torch.device) -> Stream:
        return self.streams[device.index or 0]

    def give(self, device: torch.device, work: Callable[[], object]) -> None:
        """Work for a device; some of what waits is done, or none."""
        if self.recording is not None:
            if self.recording.device != device:
                raise RuntimeError(f"work on {device} while steps on {self.recording.device} are recorded")
            self.recording.work.append(work)
            return
        self._stream(device).queue.append(work)
        if self.rng.random() < 0.01:
            self._haste = self.rng.choice((0.0, 0.0, 0.02, 0.3))
        while self.rng.random() < self._haste:
            stream = self.rng.choice(self.streams)
            with self._working():
                stream.until(min(stream.done + self.rng.choice((1, 5, 50)), stream.end))

    def wait(self, why: str) -> None:
        """The host waits for all devices."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        self.num_waits += 1
        with self._working():
            for stream in self.streams:
                stream.until(stream.end)

    @staticmethod
    @contextmanager
    def _working() -> Iterator[None]:
        with _disable_current_modes(), torch.inference_mode():
            yield

    def launch(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, work: Callable[[], Tensor]
    ) -> Tensor:
        """A kernel of our own: it is compiled, or loaded, when a shape is launched for the first time."""
        key = name, shape, device
        if self.recording is not None and key not in self.launched:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} {shape} has not been loaded")
        self.launched.add(key)
        out = self._new(torch.empty(shape, dtype=dtype), device)
        self.give(device, lambda: out.memory.copy_(work()))
        return out

    def _new(self, memory: Tensor, device: torch.device) -> Handle:
        poison(memory)
        made = Handle(memory, device, _Token())
        if self.recording is not None:
            self._pool.append((memory, weakref.ref(made.token)))
        return made

    # --- torch's ops -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        handles = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Handle)]
        name = func._schema.name.split("::")[1]
        target = next((d for d in tree_flatten((args, kwargs))[0] if isinstance(d, torch.device)), None)
        if not handles and (target is None or target.type != KIND):
            return func(*args, **kwargs)
        if name in TRANSFERS:
            moved = self._transfer(func, name, args, kwargs, target)
            if moved is not None:
                return moved
        if name in READS:
            self.wait(name)
            return func(*self._memory(args), **self._memory(kwargs))
        makes = target is not None and name.startswith(("empty_like", "new_"))
        devices = {target} if makes else {handle.device for handle in handles} or {target}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: tensors on {devices}")
        where = devices.pop()
        assert where is not None
        self._check_host_tensors(func, name, args, kwargs)
        args, kwargs = self._snapshots(args), self._snapshots(kwargs)
        if func._schema.is_mutable:
            self.give(where, lambda: func(*self._memory(args), **self._memory(kwargs)))
            return kwargs["out"] if "out" in kwargs else args[0]
        if func.is_view:
            found = func(*self._memory(args), **self._memory(kwargs))
            owners = {handle.memory.untyped_storage().data_ptr(): handle for handle in handles}
            parts = [part for part in tree_flatten(found)[0] if isinstance(part, Tensor)]
            if all(part.untyped_storage().data_ptr() in owners for part in parts):
                return tree_map_only(
                    Tensor, lambda part: Handle(part, where, owners[part.untyped_storage().data_ptr()].token), found
                )
        return self._computed(func, name, args, kwargs, where)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any, where: torch.device) -> Any:
        """New memory: its shape is known at once, what is in it later."""
        shapes = func(*self._shapes(args), **self._shapes(kwargs))
        made = tree_map_only(
            Tensor, lambda s: self._new(torch.empty_strided(s.size(), s.stride(), dtype=s.dtype), where), shapes
        )
        if not name.startswith(("empty", "new_empty")):
            flat = [each for each in tree_flatten(made)[0] if isinstance(each, Handle)]

            def work() -> None:
                found = tree_flatten(func(*self._memory(args), **self._memory(kwargs)))[0]
                for out, value in zip(flat, [each for each in found if isinstance(each, Tensor)], strict=True):
                    out.memory.copy_(value)

            self.give(where, work)
        return made

    def _transfer(self, func: Any, name: str, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """To another device; None where both are one."""
        if name == "copy_":
            to, source = args[0], args[1]
            target, waits = to.device, not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            to, source = None, args[0]
            waits = not (
                kwargs.get("non_blocking") or (name == "to" and func._overloadname == "device" and args[3:4] == (True,))
            )
        if target is None or target == source.device:
            return None
        dtype = to.dtype if to is not None else kwargs.get("dtype") or source.dtype
        if target.type != KIND:
            self.wait("a copy to the host")
            if to is not None:
                return to.copy_(source.memory)
            return source.memory.to(dtype=dtype, copy=True)
        if to is None:
            to = self._new(torch.empty(source.shape, dtype=dtype), target)
        if isinstance(source, Handle):
            self._between(to, source)
            return to
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing: a copy from the host is not done again")
        pinned = source.untyped_storage().data_ptr() in self._pinned
        held = source if pinned else source.clone()
        self.give(target, lambda: to.memory.copy_(held))
        if waits or not pinned:  # CUDA copies pageable memory by way of its own, perhaps after all that was begun before
            self.wait("a copy from the host that is waited for")
        return to

    def _between(self, to: Handle, source: Handle) -> None:
        """On the source's stream, when the target's has come to this point; which goes on after it."""
        if self.recording is not None:
            raise RuntimeError("a copy between devices while steps are recorded")
        theirs, ours = self._stream(to.device), self._stream(source.device)
        ready = theirs.end

        def copy() -> None:
            theirs.until(ready)
            to.memory.copy_(source.memory)

        self.give(source.device, copy)
        copied = ours.end
        self.give(to.device, lambda: ours.until(copied))

    def _check_host_tensors(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """A GPU's kernels take no tensor of the host but single numbers; indices are copied, which is waited for."""
        for each in tree_flatten((args, kwargs))[0]:
            if isinstance(each, Tensor) and not isinstance(each, Handle) and each.dim():
                if not name.startswith("index"):
                    raise RuntimeError(f"{func}: a tensor on the host")
                self.wait("an index on the host")

    @staticmethod
    def _memory(tree: Any) -> Any:
        tree = tree_map_only(Handle, lambda handle: handle.memory, tree)
        return tree_map_only(torch.device, lambda device: torch.device("cpu"), tree)

    @staticmethod
    def _snapshots(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda each: each if isinstance(each, Handle) else each.clone(), tree)

    @staticmethod
    def _shapes(tree: Any) -> Any:
        def shape(each: Tensor) -> Tensor:
            return torch.empty_strided(each.size(), each.stride(), dtype=each.dtype, device="meta") if each.dim() else each

        tree = tree_map_only(Tensor, lambda each: shape(each.memory if isinstance(each, Handle) else each), tree)
        return tree_map_only(torch.device, lambda device: torch.device("meta"), tree)
