"""All checks of the C++ kernels for the CPU, each under every instruction set that the machine runs. Also a program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ollamapy import extension
from tests.csrc import check_ops
from tests.ops import cpu_attention, cpu_decoder, cpu_linear, cpu_sampling

CHECKS: list[Callable[[], Any]] = [
    check_ops.check_all,
    *cpu_linear.checks(),
    *cpu_attention.checks(),
    *cpu_decoder.checks(),
    *cpu_sampling.checks(),
]


def main() -> None:
    ops = extension.load()
    assert ops is not None, extension.status()
    ops.set_threads(2)
    for isa in ops.cpu_isas().split():
        ops.cpu_isa(isa)
        for check in CHECKS:
            start = time.perf_counter()
            found = check()
            name = f"{check.__module__.split('.')[-1]}.{check.__name__}"
            print(f"{isa:10} {name} {time.perf_counter() - start:.2f} s {_short(found)}", flush=True)


def _short(found: Any) -> str:
    """Largest errors, as shares of their bounds, to two digits."""
    if isinstance(found, dict):
        return ", ".join(f"{name} {_short(share)}" for name, share in found.items())
    if isinstance(found, tuple):
        return " / ".join(map(_short, found))
    return "" if found is None else f"{found:.2g}"


if __name__ == "__main__":
    main()
