"""Grouped matmuls on packed experts, interpreted, against ollamapy.reference."""

from __future__ import annotations

import pytest
import torch

from ollamapy import reference
from ollamapy.gguf.types import GGMLType
from ollamapy.triton_kernels import layout, moe, tuning
from tests.triton.data import random_weight


@pytest.mark.parametrize(("tokens", "experts", "used"), [(1, 4, 2), (5, 3, 2), (40, 2, 1)])
@pytest.mark.parametrize("types", [(GGMLType.Q4_K, GGMLType.Q8_0), (GGMLType.Q6_K, GGMLType.MXFP4)], ids=str)
@pytest.mark.parametrize("joined", [False, True])
def test_moe(types: tuple[GGMLType, GGMLType], tokens: int, experts: int, used: int, joined: bool) -> None:
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
    held = moe.Experts(gate, up, down, layout.join([gate, up]) if joined else None)
    stream = torch.ones(tokens, 256)
    got = moe.mix(x, logits, held, routing, "silu", stream, True)
    torch.testing.assert_close(got, want + 1, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    if not joined and tokens != 5:
        assert torch.equal(moe.moe(x, logits, (gate, up, down), routing, "silu") + 1, got)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random_weight(GGMLType.Q4_K, 3, *shape, seed=i) for i, shape in enumerate([(32, 256), (32, 256), (256, 256)])]
    weights[2] = random_weight(GGMLType.Q8_0, 3, 256, 32, seed=3)
    x, logits = torch.randn(40, 256) * 0.05, torch.randn(40, 3)
    dense = tuple(weight.dequantize() for weight in weights)
    want = reference.moe(x, logits, (dense[0], dense[1], dense[2]), reference.Routing(2), "silu")
    monkeypatch.setattr(tuning, "activations", lambda device, precise=False: torch.bfloat16)
    half = moe.moe(x, logits, tuple(layout.pack(weight) for weight in weights), reference.Routing(2), "silu")
    torch.testing.assert_close(half, want, rtol=0.05, atol=2**-6 * float(want.abs().max()))


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_selected"])
@pytest.mark.parametrize(("experts", "used", "scale"), [(1, 1, 0.0), (9, 3, 2.5), (64, 8, 0.0)])
def test_route(gating: reference.Gating, experts: int, used: int, scale: float) -> None:
    logits = 3 * torch.randn(4, experts, generator=torch.Generator().manual_seed(experts))
    for renormalize in (True, False):
        routing = reference.Routing(used, gating, renormalize, scale)
        ids, weights = moe.route(logits, routing)
        want_ids, want = reference.route(logits, routing)
        assert torch.equal(ids.long(), want_ids)
        torch.testing.assert_close(weights, want, rtol=2e-6, atol=1e-7)


def test_equal_experts() -> None:
    """The lower number first, whatever the size of the batch."""
    assert moe.route(torch.zeros(2, 5), reference.Routing(3))[0].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_selected"])
@pytest.mark.parametrize(("experts", "used"), [(4, 2), (5, 3)])
def test_bad_numbers_choose_experts(gating: reference.Gating, experts: int, used: int) -> None:
    """NaN in a row chooses experts that exist, and harms no other row: by a matvec each, and by tiles."""
    weights = [layout.pack(random_weight(GGMLType.Q8_0, experts, 32, 32, seed=seed)) for seed in range(3)]
    held, routing = moe.Experts(*weights), reference.Routing(used, gating)
    generator = torch.Generator().manual_seed(3)
    for tokens in (6, 40):
        x, logits = torch.randn(tokens, 32, generator=generator), torch.randn(tokens, experts, generator=generator)
        whole = moe.mix(x, logits, held, routing, "silu", torch.zeros_like(x), False)
        marred = logits.clone()
        marred[2], marred[3, 1] = torch.nan, torch.nan
        ids, shares = moe.route(marred, routing)
        assert ((ids >= 0) & (ids < experts)).all() and shares[2:4].isnan().all()
        got = moe.mix(x, marred, held, routing, "silu", torch.zeros_like(x), False)
        assert got[2:4].isnan().all()
        got[2:4], whole[2:4] = 0, 0
        # a row has another place in its tile, and numpy, which interprets, sums 32 products in another order there
        torch.testing.assert_close(got, whole, rtol=0, atol=32 * 2**-23 * float(whole.abs().max()))


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
