"""The arguments of embedding_rows: what it refuses, by name; and the block table against Python's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ollamapy import extension
from ollamapy.gguf.types import TYPES, GGMLType


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    loaded = extension.load()
    if loaded is None:
        pytest.skip(extension.status())
    yield loaded


def test_block_layouts_equal_the_python_table(ops: Any) -> None:
    known = {kind for kind in GGMLType if ops.block_layout(int(kind)) != (0, 0)}
    assert len(known) == 16
    for kind in known:
        assert ops.block_layout(int(kind)) == (TYPES[kind].block_size, TYPES[kind].type_size)
    assert ops.block_layout(-1) == ops.block_layout(4) == ops.block_layout(10**9) == (0, 0)


DATA = torch.zeros(4, 36, dtype=torch.uint8)
IDS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("data", "kind", "ids", "problem"),
    [
        (DATA, 99, IDS, "no decoder for tensor type 99"),
        (DATA, -2, IDS, "no decoder for tensor type -2"),
        (DATA.float(), 2, IDS, "data has the wrong dtype"),
        (DATA[0], 2, IDS, "data has 1 dimensions, not 2"),
        (DATA[:, ::2], 2, IDS, "rows of data are not contiguous"),
        (DATA[:, :35], 2, IDS, "rows of 35 bytes are not whole blocks of 18"),
        (torch.zeros(150, dtype=torch.uint8)[1:145].view(4, 36), 2, IDS, "not aligned to 2 bytes"),
        (torch.zeros(4, 37, dtype=torch.uint8)[:, :36], 2, IDS, "not aligned to 2 bytes"),
        (DATA, 2, IDS.float(), "ids must be int32 or int64"),
        (DATA, 2, IDS.view(1, 2), "ids has 2 dimensions, not 1"),
        (DATA, 2, torch.tensor([0, 4]), "id 4 is not a row of 4"),
        (DATA, 2, torch.tensor([-1]), "id -1 is not a row of 4"),
        (DATA, 2, torch.tensor([1 << 40]), "is not a row of 4"),
        (DATA[:0], 2, torch.tensor([0]), "id 0 is not a row of 0"),
    ],
)
def test_wrong_arguments_are_refused(ops: Any, data: torch.Tensor, kind: int, ids: torch.Tensor, problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        ops.embedding_rows(data, kind, ids)


def test_empty_results_have_their_shape(ops: Any) -> None:
    assert ops.embedding_rows(DATA, 2, IDS[:0]).shape == (0, 64)
    assert ops.embedding_rows(DATA[:, :0], 2, IDS).shape == (2, 0)


def test_one_name_for_the_library_in_force() -> None:
    assert extension.load() is extension.load()
    assert extension.status().split(":")[0] in ("prebuilt", "built on first use", "off", "unavailable")
    assert bool(extension.isa()) == (extension.load() is not None)
