"""Memory of KV pools: zeros that are there when they are touched, and not more of it than that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from ollamapy.cpu_memory import SMALL_PAGES, untouched


def facts(address: int) -> dict[str, int]:
    """What the kernel says of the mapping that holds the address, in KB."""
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(each, 16) for each in region.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return {name: int(size) for name, size in re.findall(r"^(\w+): +([0-9]+) kB", region, re.MULTILINE)}
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (4097, 64, 17)])
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = untouched(shape, dtype)
    assert (tuple(made.shape), made.dtype, made.is_contiguous()) == (shape, dtype, True)
    assert not made.any()
    made[-1, -1] = 1
    assert made.sum() == made[-1, -1].numel()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account")
def test_the_first_blocks_touch_small_pages_only() -> None:
    made = untouched((16 * SMALL_PAGES,), torch.uint8)
    for at in range(0, SMALL_PAGES, SMALL_PAGES // 8):
        made[at] = 1
    held = facts(made.data_ptr())
    assert held["AnonHugePages"] == 0
    assert held["Rss"] == 8 * 4


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError, match="KV cache"):
        untouched((1 << 60,), torch.uint8)
