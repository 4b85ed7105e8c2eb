"""Makes the checkout's triton_kernels/ importable by its installed name, and its interpreter able to multiply bfloat16.

Triton either interprets kernels or compiles them, for the whole life of a process: TRITON_INTERPRET is read when kernels are
defined. So the files check_*.py, which pytest does not collect by itself, run in a process of their own (see test_kernels.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "triton_kernels"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_checkout() -> None:
    """What `pip install -e .` also does."""
    if importlib.util.find_spec("ollamapy.triton_kernels") is None:
        spec = importlib.util.spec_from_file_location(
            "ollamapy.triton_kernels", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)


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


use_checkout()
if INTERPRETED:
    multiply_bfloat16()
