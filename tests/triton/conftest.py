"""Makes Triton's interpreter able to multiply bfloat16 and to round to float8; on a GPU, without it, carries launches there.

Triton either interprets kernels or compiles them, for the whole life of a process: TRITON_INTERPRET is read when kernels are
defined. So the files check_*.py, which pytest does not collect by itself, run in a process of their own (see test_kernels.py).
"""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw uint16 and would multiply these bits; here `tl.dot` takes them as float32."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    create_dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)


def round_float8() -> None:
    """The interpreter loses the carry from mantissa to exponent: 1.97 becomes 1.0. Here torch rounds."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            within = torch.from_numpy(np.array(values)).clamp(-448.0, 448.0)  # as NVIDIA's instruction saturates
            return within.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(values, source, target, mode)

    interpreter._convert_float = rounded


class Carried:
    """Tensors of the host on a device for one launch. Memory that tensors share there they share here: storages are copied."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pairs: dict[int, tuple[Any, Any]] = {}  # by address: bytes here, bytes there

    def there(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._pairs:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._pairs[storage.data_ptr()] = here, here.clone().to(self._device)
        bytes_there = self._pairs[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=self._device)
        return empty.set_(bytes_there, value.storage_offset(), value.shape, value.stride())

    def back(self) -> None:
        for here, there in self._pairs.values():
            here.copy_(there)


def carry_launches(jit_function: type, device: str) -> None:
    """Kernels run on `device` while the checks, as in the interpreter, hold tensors of the host."""
    run = jit_function.run  # type: ignore[attr-defined]

    def carried(self: Any, *args: Any, **kwargs: Any) -> Any:
        carrier = Carried(device)
        kwargs = {name: carrier.there(value) for name, value in kwargs.items()}
        result = run(self, *map(carrier.there, args), **kwargs)
        carrier.back()
        return result

    jit_function.run = carried  # type: ignore[attr-defined]


if INTERPRETED:
    multiply_bfloat16()
    round_float8()
elif os.environ.get("TRITON_CHECK_DEVICE"):  # see bench/gpu_steps.py
    from triton.runtime.jit import JITFunction

    import ollamapy.triton_kernels as triton_kernels

    carry_launches(JITFunction, os.environ["TRITON_CHECK_DEVICE"])
    triton_kernels.objection = lambda device: ""
