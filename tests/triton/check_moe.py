"""Grouped matmuls on packed experts, interpreted, against ollamapy.reference."""

from __future__ import annotations

import pytest
import torch

from ollamapy import reference
from ollamapy.gguf.types import GGMLType
from ollamapy.triton_kernels import layout, moe
from tests.triton.data import random_weight


@pytest.mark.parametrize(("tokens", "experts", "used"), [(1, 4, 2), (7, 3, 2), (40, 2, 1)])
@pytest.mark.parametrize("types", [(GGMLType.Q4_K, GGMLType.Q8_0), (GGMLType.Q6_K, GGMLType.MXFP4)], ids=str)
def test_moe(types: tuple[GGMLType, GGMLType], tokens: int, experts: int, used: int) -> None:
    """An expert that nobody chose, runs that end within a tile, and experts with more rows than one tile has."""
    generator = torch.Generator().manual_seed(tokens)
    weights = [
        random_weight(types[0], experts, 32, 256, seed=1),
        random_weight(types[0], experts, 32, 256, seed=2),
        random_weight(types[1], experts, 256, 32, seed=3),
    ]
    x = torch.randn(tokens, 256, generator=generator) * 0.05
    logits = torch.randn(tokens, experts, generator=generator)
    if experts > used + 1:
        logits[:, 1] = -100.0
    routing = reference.Routing(used)
    gate, up, down = (layout.pack(weight) for weight in weights)
    dense = tuple(weight.dequantize() for weight in weights)
    want = reference.moe(x, logits, (dense[0], dense[1], dense[2]), routing, "silu")
    got = moe.routed_experts(x, logits, (gate, up, down), routing, "silu", torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    half = moe.moe(x, logits, (gate, up, down), routing, "silu")
    torch.testing.assert_close(half, want, rtol=0.05, atol=2**-6 * float(want.abs().max()))


def test_runs() -> None:
    ids = torch.tensor([[2, 0], [2, 1], [2, 0]])
    runs = moe.sort_by_expert(ids, 4)
    rows = runs.tile.rows
    assert runs.expert_of.tolist()[:3] == [0, 1, 2]
    assert [[p for p in runs.pair_of[t * rows : (t + 1) * rows].tolist() if p >= 0] for t in range(3)] == [
        [1, 5],
        [3],
        [0, 2, 4],
    ]
    assert moe.moe(torch.zeros(0, 8), torch.zeros(0, 4), (None,) * 3, reference.Routing(1), "silu").shape == (0, 8)
