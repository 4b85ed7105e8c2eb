"""The engine process: torch's threads, the model and the engine that a Plan describes. The only file here that imports torch.

Imported by the forkserver before any engine exists, so nothing here may start a thread or touch a device at import.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from ollamapy import __version__, extension, ops
from ollamapy.cores import physical_cores
from ollamapy.engine.accelerator import accelerator
from ollamapy.engine.engine import Engine
from ollamapy.engine.grammar import Vocabulary
from ollamapy.engine.prefix_store import PrefixStore
from ollamapy.engine.protocol import Plan
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.lifecycle.loop import Loop, Progress
from ollamapy.models.adapter import load_adapter
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from ollamapy.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")

SWITCH = 0.0002  # seconds after which a thread that prepares a grammar gives Python's lock to the one that generates; 5 ms else
NICE = 10  # of a load: a tenth of what a thread that generates gets where both want the same core


def build_engine(plan: Plan, progress: Progress) -> Engine:
    """Loads the model, and its draft model. Raises GGUFError, UnsupportedModel, MemoryError and what torch raises."""
    threads = plan.num_threads or physical_cores()
    torch.set_num_interop_threads(1)
    ops.set_threads(threads, loading=True)
    kind = f"{plan.kv_dtype} KV{', precise' if plan.precise else ''}"
    log.info("loading %s on %s with %d threads, %s", Path(plan.model_path).name, plan.device, threads, kind)
    model = _yielding(lambda: _load(plan.model_path, plan, progress))
    kernels = ops.chosen()
    log.info("kernels: %s", _by_family(kernels))
    draft = None
    if plan.draft_path:
        check_vocabularies(plan.model_path, plan.draft_path)
        draft = _yielding(lambda: _load(plan.draft_path, plan, progress))
        differing = [op for op in _SHARED_OPS if ops.chosen()[op] != kernels[op]]
        if differing:
            raise UnsupportedModel(f"the draft model needs other kernels than the model it drafts for: {', '.join(differing)}")
    ops.set_threads(threads)
    return Engine(
        model,
        plan,
        kernels,
        read_vocabulary=lambda: read_vocabulary(plan.model_path),
        draft_model=draft,
        load_adapter=lambda path: _yielding(lambda: load_adapter(Path(path), model, torch.device(plan.device))),
        store=open_store(plan),
        accelerator=accelerator(torch.device(plan.device), [torch.device(span.device) for span in plan.spans]),
    )


def _by_family(kernels: Mapping[str, str]) -> str:
    """Of op -> family: families, each with its ops; C++ for the CPU with its instruction set."""
    ops_of: dict[str, list[str]] = {}
    for op, family in kernels.items():
        ops_of.setdefault(f"csrc ({isa})" if family == "csrc" and (isa := ops.cpu_isa()) else family, []).append(op)
    return "; ".join(f"{family}: {', '.join(served)}" for family, served in sorted(ops_of.items()))


_SHARED_OPS = ("attention", "write_kv", "new_cache")  # one choice serves all models of a process


def _load(path: str, plan: Plan, progress: Progress) -> Decoder:
    with GGUFFile.open(path) as file:
        device = torch.device(plan.device)
        return load_model(
            file,
            device,
            progress,
            context_length=plan.context_length,
            longest=plan.max_context,
            kernels=plan.kernels,
            precise=plan.precise,
            spans=plan.spans if path == plan.model_path else (),
        )


def _yielding(load: Callable[[], T]) -> T:
    """What `load` returns; it runs in a thread, with threads of its own, that leave the cores to engines that generate."""

    def run() -> T:
        if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        return load()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def check_vocabularies(path: str, draft_path: str) -> None:
    """Raises UnsupportedModel when a draft model's tokens are not those of the model that it drafts for."""
    with GGUFFile.open(path) as file, GGUFFile.open(draft_path) as draft:
        own, other = (list(each.metadata.get("tokenizer.ggml.tokens", [])) for each in (file, draft))
    if len(own) != len(other):
        raise UnsupportedModel(f"the draft model has {len(other)} tokens and the model {len(own)}: they must be the same")
    for token_id, (token, drafted) in enumerate(zip(own, other, strict=True)):
        if token != drafted:
            raise UnsupportedModel(f"token {token_id} of the draft model is {drafted!r} and of the model {token!r}")


def open_store(plan: Plan) -> PrefixStore | None:
    """The files of this model's prefixes; None where there shall be none, or the folder cannot be used."""
    if not plan.prefix_folder or not plan.prefix_cache:
        return None
    layout = (plan.context_length, plan.kv_dtype, plan.block_size, plan.groups, plan.precise, plan.device.partition(":")[0])
    kernels = (ops.chosen(), extension.isa(), __version__, torch.__version__)
    identity = repr([_file_identity(plan.model_path), layout, kernels])
    try:
        return PrefixStore(Path(plan.prefix_folder), plan.prefix_bytes, identity)
    except OSError as error:
        log.warning("prefixes are not kept on disk: %s", error)
        return None


def _file_identity(path: str) -> object:
    """A blob is named by its digest; another file is known by its size and time too."""
    name = Path(path).name
    if re.fullmatch(r"sha256[-:][0-9a-f]{64}", name):
        return name
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


def read_vocabulary(path: str) -> Vocabulary:
    """The tokens of a model file, as grammars need them: 0.4 s for 49,152, 1 s for 262,144."""
    with GGUFFile.open(path) as file:
        metadata, tensors = normalise(file.metadata, file.tensors)
        embedding = tensors.get("token_embd.weight")
        tokenizer = Tokenizer.from_gguf(metadata, embedding_rows=embedding.shape[0] if embedding else None)
    ids = range(tokenizer.vocab_size)
    special = [id for id in ids if tokenizer.is_control(id) or id in tokenizer.eog_ids]
    return Vocabulary([tokenizer.token_bytes(id) for id in ids], special, sorted(tokenizer.eog_ids))


def packed_on() -> tuple[str, ...]:
    """Device kinds whose kernels keep matrices as the file has them. Loads the C++ extension, for all engines.

    GPUs are not asked: whatever looks at one starts CUDA here, and then no engine forked from this process could use it.
    """
    place = ops.Place(torch.device("cpu"), GGMLType.Q4_0)
    family = next(kernel.family for kernel in ops.kernels_for("linear") if not kernel.needs(place))
    on_gpu = find_spec("triton") is not None  # all kernels for GPUs share the layout of Triton's
    return (*(("cpu",) if family != "reference" else ()), *(("cuda",) if on_gpu else ()))


def main(sock: socket.socket, plan: Plan) -> None:
    sys.setswitchinterval(SWITCH)
    Loop(sock, plan, build_engine).run()
