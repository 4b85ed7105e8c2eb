"""ModelRunner: one model, its KV caches, one forward pass. Knows no request and no policy."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Protocol

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.protocol import LayerGroup, Plan
from ollamapy.errors import EngineError

KV_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "q8_0": torch.uint8,  # as bytes
    "fp8": torch.float8_e4m3fn,
}


class Config(Protocol):
    """What the engine reads of a model's configuration."""

    @property
    def architecture(self) -> str: ...
    @property
    def embedding_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def pooling_type(self) -> str: ...


class Model(Protocol):
    """What the engine asks of a model."""

    weight_bytes: int
    vram_bytes: int  # of the weights, those on a GPU

    @property
    def config(self) -> Config: ...
    def new_caches(
        self,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        groups: ListLike[LayerGroup] = (),
    ) -> list[KVCache]:
        """A paged cache per layer, zeroed: a kernel that multiplies a stale slot by 0 must not meet a NaN there. The n-th
        layers of all groups share their tensors."""
        ...

    def forward(self, batch: Batch, caches: ListLike[KVCache]) -> Tensor:
        """Hidden states of `batch.logit_rows` after the final norm, (num_logits, E) float32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, V) float32."""
        ...


class ModelRunner:
    """Has the model's caches allocated, with `spare_blocks` that are in no pool. Raises EngineError when the device has not the
    memory."""

    def __init__(self, model: Model, plan: Plan, spare_blocks: int = 0) -> None:
        self.model = model
        self.device = torch.device(plan.device)
        try:
            dtype = KV_DTYPES[plan.kv_dtype]
            self.caches = model.new_caches(plan.num_blocks + spare_blocks, plan.block_size, dtype, plan.groups)
        except (MemoryError, RuntimeError) as error:  # torch on a CPU raises RuntimeError, on a GPU a subclass of it
            tokens = plan.num_blocks * plan.block_size
            raise EngineError(f"no memory for a KV cache of {tokens} tokens on {plan.device}: {error}") from error
        self.kv_bytes = sum(tensor.nbytes for tensor in self.tensors)
        self.vram_bytes = model.vram_bytes + sum(tensor.nbytes for tensor in self.tensors if tensor.device.type != "cpu")

    @property
    def tensors(self) -> list[Tensor]:
        """All that the caches consist of, blocks first; what layers share is there once. fp8 as bytes: torch indexes no fp8."""
        tensors = (tensor for cache in self.caches for tensor in cache.tensors())
        tensors = (tensor.view(torch.uint8) if tensor.dtype is KV_DTYPES["fp8"] else tensor for tensor in tensors)
        return list({(tensor.device, tensor.data_ptr()): tensor for tensor in tensors}.values())

    def copy_blocks(self, copies: ListLike[tuple[int, int]]) -> None:
        """Copies the content of blocks, from and to, as if one after the other."""
        sources, targets = [source for source, _ in copies], [target for _, target in copies]
        if set(sources) & set(targets) or len(set(targets)) < len(targets):
            for copy in copies:
                self.copy_blocks([copy])
            return
        for tensor in self.tensors:
            tensor[targets] = tensor[sources]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """(num_logits, E) float32."""
        return self.model.forward(batch, self.caches)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, V) float32."""
        return self.model.logits(hidden)
