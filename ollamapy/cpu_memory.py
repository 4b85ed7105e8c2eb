"""Memory of KV pools on the CPU: zeros that take no room before they are touched. Knows no cache."""

from __future__ import annotations

import contextlib
import math
import mmap
import random
import sys

import numpy as np
import torch
from torch import Tensor

SMALL_PAGES = 2 << 20  # bytes of a tensor, at least and less than twice as many


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system hands out as they are touched: torch.zeros would write a whole pool at load (0.3 s for 755 MB).
    Raises MemoryError.

    In pages of 4 KB first: a short chat would touch one of 2 MB in each layer, 120 MB where it uses 4, and wait 0.1 ms for
    each, or up to 7 where a virtual machine's host has taken them back. Long contexts read pages of 2 MB, 10 % faster at 4,096
    tokens; those begin at another place in each tensor, so that no step has to wait for all of them.
    """
    if sys.platform != "linux":
        return torch.from_numpy(np.zeros((*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).squeeze(-1)
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for a KV cache of {size} bytes") from error
    small = min(SMALL_PAGES + random.randrange(SMALL_PAGES) // mmap.PAGESIZE * mmap.PAGESIZE, size)
    with contextlib.suppress(OSError):  # a kernel whose pages have one size
        memory.madvise(mmap.MADV_NOHUGEPAGE, 0, small)
        if small < size:
            memory.madvise(mmap.MADV_HUGEPAGE, small)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
