"""Mutated files: whatever the bytes, opening and reading everything ends well or in a GGUFError, fast and in little memory."""

from __future__ import annotations

import os
import random
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamapy.errors import GGUFError
from ollamapy.gguf.reader import GGUFFile
from tests.gguf.bytes import ARRAY, BOOL, F32, STRING, U8, U16, U32, U64, File, array, key, tensor, text

SEEDS = [
    bytes(File()),
    bytes(
        File(
            keys=[
                key("general.architecture", STRING, text("llama")),
                key("general.alignment", U32, struct.pack("<I", 16)),
                key("words", ARRAY, array(STRING, 3, text("a") + text("") + text("ccc"))),
                key("nested", ARRAY, array(ARRAY, 2, array(U8, 2, b"\1\2") + array(STRING, 1, text("z")))),
                key("flags", ARRAY, array(BOOL, 2, b"\0\1")),
                key("floats", ARRAY, array(F32, 4, bytes(16))),
                key("split.no", U16, b"\0\0"),
                key("big", U64, bytes(8)),
            ],
            tensors=[tensor("a", (32, 2), 2), tensor("b", (256,), 12, 48), tensor("c", (3,), 0, 192)],
            data=bytes(256),
            alignment=16,
        )
    ),
]
INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    127,
    128,
    255,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]


def mutate(rng: random.Random) -> bytes:
    content = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        choice = rng.randrange(5)
        if choice == 0:
            content[at] = rng.randrange(256)
        elif choice == 1:
            width = rng.choice((4, 8))
            value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
            content[at : at + width] = value.to_bytes(width, "little")
        elif choice == 2:
            del content[at : at + rng.randint(1, 16)]
        elif choice == 3:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            content = content[: at + 1]
        if not content:
            break
    return bytes(content)


def read_everything(path: Path) -> bool:
    """Whether the file is accepted. Anything but a GGUFError passes through and fails the test."""
    try:
        with GGUFFile.open(path) as file:
            for name in file.metadata:
                file.metadata[name]
                file.metadata.typed(name)
            for name, info in file.tensors.items():
                assert len(file.data(name)) == info.nbytes
    except GGUFError as error:
        assert error.field and error.offset >= 0
        return False
    return True


@pytest.fixture
def memory_file() -> Iterator[Path]:
    """A regular file without a disk: a hundred thousand writes would measure that instead."""
    descriptor = os.memfd_create("fuzz.gguf")
    yield Path(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def fuzz(rounds: int, seed: int, path: Path) -> int:
    rng = random.Random(seed)
    accepted, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        path.write_bytes(mutate(rng))
        start = time.perf_counter()
        accepted += read_everything(path)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    return accepted


def test_mutations(memory_file: Path) -> None:
    accepted = fuzz(4000, 20, memory_file)
    assert 100 < accepted < 3900  # the mutations reach both outcomes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_mutations(seed: int, memory_file: Path) -> None:
    fuzz(100_000, 1000 + seed, memory_file)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_bytes_behind_a_good_beginning(tail: bytes, counts: int) -> None:
    content = b"GGUF" + struct.pack("<IQQ", 3, counts & 1, counts >> 1) + tail
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "h.gguf"
        path.write_bytes(content)
        read_everything(path)
