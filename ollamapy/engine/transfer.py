"""From the host to where a step is computed. Knows no CUDA but that a copy from memory that is not pinned may wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, without waiting for what the device does; on a CPU the tensor itself.

    From pageable memory CUDA copies in its own time: the host could wait for the whole step before. Torch keeps pinned memory
    for the next copies, and gives it out again when this one is done.
    """
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
