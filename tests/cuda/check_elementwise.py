"""Norms, gated activations, and heads on their way to attention, against the reference. Run by test_on_cpu.py, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from ollamapy import cuda_kernels, reference
from ollamapy.engine.batch import KVCache
from tests.cuda.data import activations, int8_rows

pytestmark = pytest.mark.gpu


def values(rows: cuda_kernels.Int8Rows) -> torch.Tensor:
    """Int8 rows as float32 again, in the order of the weights."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes = rows.q.cpu().view(torch.int8).transpose(0, 1).unflatten(-1, (8, 4))[:, :, order].flatten(2).float()
    scale = rows.meta.cpu()[..., 0].contiguous().view(torch.float32).t()
    return (codes * scale.unsqueeze(-1)).flatten(1)


def near_int8(got: torch.Tensor, want: torch.Tensor) -> None:
    """Half a step of the group, and what rounding before it does to a step."""
    _, scale = int8_rows(want)
    step = scale.repeat_interleave(32, 1)
    assert ((got - want).abs() <= step * 0.5001 + want.abs() * 1e-5 + 1e-36).all()


@pytest.mark.parametrize("width", [32, 608, 4128])
def test_add_norm(width: int, device: torch.device, schedule: str) -> None:
    x, delta, weight = activations(3, width), activations(3, width, seed=1), torch.linspace(0.5, 2, width)
    for addend in (None, delta):
        stream = x.clone().to(device)
        rows = cuda_kernels.add_norm(stream, None if addend is None else addend.to(device), weight.to(device), 1e-5)
        total = x if addend is None else x + addend
        assert torch.equal(stream.cpu(), total)
        assert rows is not None
        near_int8(values(rows), reference.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("width", [96, 2080])
def test_norm_of_a_branch(width: int, device: torch.device, schedule: str) -> None:
    """The sum with the branch's own norm, and the norm of that; the sum alone."""
    x, delta, weight = activations(3, width), activations(3, width, seed=1), torch.linspace(0.5, 2, width)
    post = torch.linspace(-1, 1, width)
    total = x + reference.rms_norm(delta, post, 1e-5)
    for wanted in (weight, None):
        stream = x.clone().to(device)
        given = None if wanted is None else wanted.to(device)
        rows = cuda_kernels.add_norm(stream, delta.to(device), given, 1e-5, post.to(device))
        torch.testing.assert_close(stream.cpu(), total, rtol=2e-6, atol=2e-6)
        assert (rows is None) == (wanted is None)
        if rows is not None:
            near_int8(values(rows), reference.rms_norm(stream.cpu(), weight, 1e-5))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_quantize(kind: reference.Activation, device: torch.device, schedule: str) -> None:
    both = activations(3, 2 * 1120)
    gate, up = both.to(device).chunk(2, dim=1)
    rows = cuda_kernels.quantize(gate, up, kind)
    want = reference.gated_activation(*(part.clone() for part in both.chunk(2, dim=1)), kind)
    near_int8(values(rows), want)


def test_more_rows_than_a_grid_is_high(device: torch.device, schedule: str) -> None:
    if schedule not in ("first-late", "gpu"):
        pytest.skip("5 s each")
    x = torch.linspace(-3, 3, 65536 * 32).view(65536, 32)
    near_int8(values(cuda_kernels.quantize(x.to(device))), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("length", "rot", "norms"), [(64, 64, False), (80, 32, True), (256, 256, True)])
def test_rope(length: int, rot: int, norms: bool, interleaved: bool, device: torch.device, schedule: str) -> None:
    """Slots in no order and one that is nobody's, partial rotation, norms of heads, a temperature; the cache keeps what is not
    written."""
    tokens, heads, kv_heads, block = 5, 3, 2, 16
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * length, generator=generator)
    angles = torch.rand(40, rot // 2, generator=generator) * 6
    turns = torch.cat((angles.cos(), angles.sin()), -1)
    positions, slots = torch.tensor([3, 39, 0, 7, 21]), torch.tensor([17, 3, 47, -1, 30])
    weights = [torch.linspace(0.5, 1.5, length), torch.linspace(-1, 1, length)] if norms else [torch.empty(0)] * 2
    temperature = torch.linspace(1, 2, tokens) if norms else torch.empty(0)
    q, k, v = (part.unflatten(1, (-1, length)).clone() for part in qkv.split([heads * length] + [kv_heads * length] * 2, 1))
    if norms:
        q, k = reference.rms_norm(q, weights[0], 1e-6), reference.rms_norm(k, weights[1], 1e-6)
    cos, sin = (part[positions].unsqueeze(1) for part in (angles.cos(), angles.sin()))
    if interleaved:
        pairs = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        pairs = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    reference.rope(q, k, *pairs, interleaved)
    if norms:
        q *= temperature.view(-1, 1, 1)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        cache = KVCache(*(torch.full((3, kv_heads, block, length), 9.0, dtype=dtype, device=device) for _ in range(2)))
        out = torch.empty(tokens, heads, length, dtype=dtype, device=device)
        facts = (turns.to(device), positions.to(device), slots.to(device), [w.to(device) for w in (*weights, temperature)])
        cuda_kernels.kernels().rope(qkv.to(device), *facts, interleaved, 1e-6, out, cache.key, cache.value)
        torch.testing.assert_close(out.cpu().float(), q, rtol=tolerance, atol=tolerance)
        for store, new in ((cache.key, k), (cache.value, v)):
            flat = store.cpu().transpose(1, 2).flatten(0, 1).float()
            written = slots >= 0
            torch.testing.assert_close(flat[slots[written]], new[written], rtol=tolerance, atol=tolerance)
            flat[slots[written]] = 9.0
            assert (flat == 9.0).all()
