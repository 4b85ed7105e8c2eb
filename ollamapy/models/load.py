"""From an open GGUF file to a model on a device. Every tensor has its place and every place its tensor, or it is an error."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.protocol import LayerSpan
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.layers.layer import Declared, Layer, declared_tensors
from ollamapy.models import ARCHITECTURES, upload
from ollamapy.models.config import ModelConfig
from ollamapy.models.decoder import Decoder
from ollamapy.quant.tensor import QuantTensor

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a status, the bytes of weights done and those to do."""

Job = tuple[Layer, str, Declared, list[TensorInfo], torch.device]
"""A layer's key, what it declared, the tensors of the file that fill it, and where it belongs."""

OTHER_MODALITIES = ("v.", "mm.", "a.")  # vision and audio towers that some files carry beside the text model
_SHOWN = 12  # names listed in an error


def load_model(
    file: GGUFFile,
    device: torch.device,
    progress: Progress | None = None,
    *,
    context_length: int = 0,
    longest: int = 0,
    kernels: str = "",
    precise: bool = False,
    spans: Sequence[LayerSpan] = (),
) -> Decoder:
    """A model ready to run, its weights in the form of the kernels that the device allows; `kernels` forces a family of them,
    `precise` those that keep activations in the precision of float32.

    `context_length` is what sequences are expected to have at most (0: what the file says); longrope models choose factors by
    it. Some may have up to `longest` tokens.
    `spans` put layers on other devices than `device`.
    Raises UnsupportedModel for an architecture, tensors or shapes that cannot be run, naming them. Weights that are used as
    they lie in the file stay mapped after the file is closed.
    """
    config = ModelConfig.from_gguf(file.metadata)
    _, tensors = normalise(file.metadata, file.tensors)
    for each in (*(torch.device(span.device) for span in spans), device):
        ops.choose(each, kernels, tuple({*config.key_length, *config.value_length}), precise=precise)
    skipped = {name for name in tensors if name.startswith(OTHER_MODALITIES)}
    if skipped:
        log.info("leaving out %d vision and audio tensors: only text is supported", len(skipped))
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name not in skipped}
    model = _architecture(config.architecture)(config, shapes, context_length)
    model.place(device, spans, longest)
    wanted = [
        (layer, key, declared, declared.sources or (name,), _device(model, name))
        for name, layer, key, declared in declared_tensors(model)
    ]
    _check({sources: declared for _, _, declared, sources, _ in wanted}, shapes)
    jobs = [(layer, key, declared, [tensors[name] for name in sources], on) for layer, key, declared, sources, on in wanted]
    _load(file, jobs, progress or (lambda status, completed, total: None))
    model.prepare()
    sizes = measure(model)
    model.weight_bytes, model.vram_bytes = sum(sizes.values()), sum(sizes.values()) - sizes.get("cpu", 0)
    return model


def _device(model: Decoder, name: str) -> torch.device:
    """Where a tensor belongs: with its layer."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return model.device if layer is None else model.device_of(int(layer[1]))


def _architecture(name: str) -> type[Decoder]:
    module, cls = ARCHITECTURES[name].split(".")
    found: type[Decoder] = getattr(importlib.import_module(f"ollamapy.models.{module}"), cls)
    return found


def _check(wanted: dict[tuple[str, ...], Declared], shapes: dict[str, tuple[int, ...]]) -> None:
    expected = {}
    for sources, declared in wanted.items():
        shape = declared.shape if len(sources) == 1 else declared.shape[1:]
        expected.update(dict.fromkeys(sources, shape))
    problems = []
    missing = [name for name in expected if name not in shapes]
    left_over = [name for name in shapes if name not in expected]
    wrong = [f"{name} {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes.get(name, shape) != shape]
    for title, names in (("missing tensors", missing), ("unknown tensors", left_over), ("tensors of another shape", wrong)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{title}: {', '.join(names[:_SHOWN])}{more}")
    if problems:
        raise UnsupportedModel("the model file does not fit its architecture; " + "; ".join(problems))


def _load(file: GGUFFile, jobs: list[Job], progress: Progress) -> None:
    """Reads each tensor once, also one that is the embedding and the head."""
    shared: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        shared.setdefault((job[-1], *(source.name for source in job[3])), []).append(job)
    groups = [(group[0][3], group[0][-1], group) for group in shared.values()]
    total = sum(source.nbytes for sources, _, _ in groups for source in sources)
    completed = 0
    progress("loading", completed, total)
    for sources, _, _ in groups:
        _check_types(sources)
    with ExitStack() as stack:
        uploads: dict[torch.device, upload.Upload] = {}
        for device in {device for _, device, _ in groups}:
            if (lane := upload.lane(device)) is not None:
                wanted = [sources for sources, on, _ in groups if on == device]
                uploads[device] = stack.enter_context(upload.Upload(file, lane, wanted))
        for sources, device, group in groups:
            _fill(group, _uploaded(uploads[device], sources) if device in uploads else _read(file, sources))
            completed += sum(source.nbytes for source in sources)
            progress("loading", completed, total)


def _fill(group: list[Job], weight: QuantTensor) -> None:
    """A matrix that is the embedding and the head is held once, where the head's kernel can give rows of what it holds."""
    head = None
    for layer, key, declared, _, device in sorted(group, key=lambda job: job[2].use == "embedding"):
        rows = ops.embedding_of(head, weight.type) if isinstance(head, ops.Weight) and declared.use == "embedding" else None
        made = rows or ops.prepare(weight, device, declared.use)
        head = made if declared.use == "linear" else head
        layer.load(key, made)


def _check_types(sources: list[TensorInfo]) -> None:
    if any(source.type is not sources[0].type for source in sources):
        raise UnsupportedModel(f"{sources[0].name} and the other experts' tensors are not all of one type")


def _uploaded(source: upload.Upload, sources: list[TensorInfo]) -> QuantTensor:
    """The same on the device."""
    shape = sources[0].shape if len(sources) == 1 else (len(sources), *sources[0].shape)
    return QuantTensor.wrap(source.next(), sources[0].type, shape)


def _read(file: GGUFFile, sources: list[TensorInfo]) -> QuantTensor:
    """One tensor of the file as it lies there, or several stacked along a new first dimension."""
    parts = [QuantTensor.from_file(file, source.name) for source in sources]
    if len(parts) == 1:
        return parts[0]
    return QuantTensor(torch.stack([part.data for part in parts]), parts[0].type, (len(parts), *parts[0].shape))


def measure(model: Decoder) -> dict[str, int]:
    """Type of device -> bytes of its memory that the weights take; tensors that share memory count once."""
    sizes: dict[tuple[torch.device, int], int] = {}

    def add(value: object) -> None:
        if isinstance(value, ops.Weight):
            value = value.data
        if not isinstance(value, Tensor):  # a QuantTensor, or what a kernel has packed
            held = getattr(value, "tensors", {"data": getattr(value, "data", None)}).values()
        else:
            held = (value,)
        for tensor in held:
            if tensor is not None:
                place = tensor.device, tensor.data_ptr()
                sizes[place] = max(sizes.get(place, 0), tensor.nbytes)

    for _, layer, key, _ in declared_tensors(model):
        add(getattr(layer, key))
    found: dict[str, int] = {}
    for (device, _), size in sizes.items():
        found[device.type] = found.get(device.type, 0) + size
    return found
