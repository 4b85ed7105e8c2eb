"""The paged KV cache: its layouts. A head's block is one piece of memory, so that a tile of keys is read in long runs.

Float types (float32, float16, bfloat16, float8_e4m3fn) are stored as they are. Q8_0 rows are the D codes of a head as int8,
then the D / 32 steps as float16: 1.0625 bytes per element, in one uint8 tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.engine.batch import KVCache, LayerState
from ollamapy.errors import UnsupportedModel

Q8_0 = torch.uint8  # the type of the tensors of a Q8_0 cache
GROUP = 32


def new_cache(state: LayerState, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """key (num_blocks, Hkv, block_size, D), value (num_blocks, Hkv, block_size, Dv). Zeros: stale memory must hold no NaN.

    Raises UnsupportedModel for a Q8_0 cache of heads that are no multiple of 32.
    """
    slots = (num_blocks, state.num_kv_heads, block_size)
    widths = [state.key_length, state.value_length]
    if dtype == Q8_0:
        if any(width % GROUP for width in widths):
            raise UnsupportedModel(f"a q8_0 KV cache needs heads of a multiple of {GROUP}, not {widths[0]} and {widths[1]}")
        widths = [width + width // 16 for width in widths]
    return KVCache(*(torch.zeros(*slots, width, dtype=dtype, device=device) for width in widths))


def quantized(cache: KVCache) -> bool:
    return cache.key.dtype == Q8_0


def lengths(cache: KVCache) -> tuple[int, int]:
    """D and Dv."""
    found = [int(store.shape[3]) for store in (cache.key, cache.value)]
    if quantized(cache):
        found = [width * 16 // 17 for width in found]
    return found[0], found[1]


def parts(store: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of one memory: codes, and for Q8_0 the float16 numbers among which the steps are."""
    return (store.view(torch.int8), store.view(torch.float16)) if store.dtype == Q8_0 else (store, store)
