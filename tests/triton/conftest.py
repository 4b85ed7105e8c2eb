"""Makes Triton's interpreter able to multiply bfloat16 and to round to float8.

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
            return torch.from_numpy(np.array(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(values, source, target, mode)

    interpreter._convert_float = rounded


if INTERPRETED:
    multiply_bfloat16()
    round_float8()
