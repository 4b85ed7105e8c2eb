"""What can be proven of the GPU kernels without a GPU, all of it, one proof after the other: `python -m tests.kernel_proofs`.

Prints each proof's seconds and verdict, and fails when one fails. 6 minutes on two cores are what they may take together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
PROOFS = {
    "Triton interpreted, against the reference": (*PYTEST, "tests/triton", "-k", "not compiled"),
    "Triton compiled for sm_80, 90, 100, 120": ("-m", "tests.triton.compiled", "--all"),
    "CUDA compiled for sm_80, 89, 90a, 100, 120": ("-m", "tests.cuda.compiled"),
    "CUDA linked, on the CPU, under sanitizers": (*PYTEST, "tests/cuda", "-k", "not no_kernel_spills"),
}


def main() -> int:
    failed = False
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:  # a compilation that was cached proves nothing
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        for proof, command in PROOFS.items():
            began = time.monotonic()
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
            lines = (done.stdout + done.stderr).strip().splitlines()
            shown = lines[-1:] if done.returncode == 0 else lines[-40:]
            verdict = "FAILED" if done.returncode else "passed"
            print(f"{proof:45} {time.monotonic() - began:5.0f} s  {verdict}  " + "\n".join(shown), flush=True)
            failed |= done.returncode != 0
    print(f"{'together':45} {time.monotonic() - start:5.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
