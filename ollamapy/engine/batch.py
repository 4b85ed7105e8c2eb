"""Batch: what one forward pass is told about its tokens. Made by `engine.build`, read by models and ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Move = Callable[[Tensor, torch.device], Tensor]
"""Takes a tensor to another device."""


class RowAdapter(Protocol):
    """What a layer asks of an adapter; `layers.lora.Adapter` is one."""

    def add(self, layer: Any, x: Tensor, y: Tensor, scale: float, rows: Tensor) -> None: ...


class AdapterRows(NamedTuple):
    """An adapter and the rows of a batch that use it."""

    adapter: RowAdapter
    scale: float
    rows: Tensor  # int64


@dataclass(slots=True)
class Batch:
    """Tokens of several sequences, concatenated; sequence s owns rows query_start[s]:query_start[s + 1].

    The newest token of a sequence is always its last row. Keys and values of rows are written to the cache
    (at `slot_mapping`) before attention reads it, so a row at position p attends to positions 0..p of its sequence.
    """

    token_ids: Tensor  # (num_tokens,) int64
    positions: Tensor  # (num_tokens,) int64, rope positions
    slot_mapping: Tensor  # (num_tokens,) int64: block_id * block_size + offset
    block_table: Tensor  # (num_seqs, max_blocks) int32, rows padded with 0; behind a window: some block of the sequence
    query_start: Tensor  # (num_seqs + 1,) int32, exclusive sums of the query lengths
    seq_lens: Tensor  # (num_seqs,) int32, tokens in the cache after this step
    logit_rows: Tensor  # (num_logits,) int64: rows whose logits (or hidden states) are wanted
    query_lens: list[int]  # host copies of the same facts, so that nothing needs a device sync
    context_lens: list[int]  # == seq_lens; of a recorded step (`engine.graphs`) bounds that hold at every replay
    adapters: tuple[AdapterRows, ...] = ()  # every row has one, or none has
    others: Sequence[Batch] = ()  # the same tokens with the slots and tables of layer groups 1, 2 ...; these are group 0's
    move: Move = Tensor.to  # how hidden states go on to the device of the next layers
    elsewhere: Mapping[torch.device, Batch] = field(
        default_factory=dict
    )  # the same on other devices, where it is there already

    @property
    def groups(self) -> tuple[Batch, ...]:
        """The batch as each layer group sees it."""
        return (self, *self.others)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if device in self.elsewhere:
            return self.elsewhere[device]
        own = {name: getattr(self, name) for name in self.__slots__}
        tensors: dict[str, Any] = {name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)}
        adapters = tuple(each._replace(rows=each.rows.to(device)) for each in self.adapters)
        return replace(self, **tensors, adapters=adapters, others=[other.to(device) for other in self.others])

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)


@dataclass(frozen=True, slots=True)
class LayerState:
    """What one layer keeps per token: the shape of its KV cache. `window` > 0: only that many last tokens are attended."""

    num_kv_heads: int
    key_length: int
    value_length: int
    window: int = 0


@dataclass(slots=True)
class KVCache:
    """One layer's paged cache."""

    key: Tensor  # the reference's: (num_blocks, block_size, num_kv_heads, key_length); GPUs have a head's slots together:
    value: Tensor  # (num_blocks, num_kv_heads, block_size, value_length); q8_0 is bytes
    group: int = 0  # whose slots and block tables it is used with; layers of other groups share the tensors

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of, each with the block as first dimension."""
        return self.key, self.value
