"""The small ops against float64 formulas, on awkward shapes, and row by row against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ollamapy import ops, reference
from ollamapy.gguf.types import GGMLType
from ollamapy.kernel_table import kernels_for
from ollamapy.ops import Kernel, Place
from ollamapy.quant.tensor import QuantTensor


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4, 64), (2, 577), (0, 8)], ids=str)
def test_norms(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape[-1])
    wide = x.double()
    close(ops.rms_norm(x, weight, 1e-5), wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight)
    expected = torch.nn.functional.layer_norm(wide, shape[-1:], weight.double(), bias.double(), 1e-5)
    close(ops.layer_norm(x, weight, bias, 1e-5), expected)
    close(ops.layer_norm(x, weight, None, 1e-5), expected - bias)


def test_norm_of_zeros_and_of_large_values() -> None:
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))
    assert torch.isfinite(ops.rms_norm(torch.full((2, 8), 1e15), torch.ones(8), 1e-6)).all()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations(kind: reference.Activation) -> None:
    torch.manual_seed(0)
    gate = torch.cat((torch.randn(1000) * 4, torch.tensor([0.0, -200.0, 200.0, -30.0, 88.0, -88.0])))
    up = torch.randn_like(gate)
    wide = gate.double()
    act = torch.nn.functional.silu(wide) if kind == "silu" else torch.nn.functional.gelu(wide, approximate="tanh")
    close(ops.gated_activation(gate.clone(), up, kind), act * up)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_do_not_depend_on_the_place_in_a_tensor(kind: reference.Activation) -> None:
    """torch's own silu and gelu do: their vector loops and the tails of these round differently."""
    torch.manual_seed(0)
    gate, up = torch.randn(1000) * 3, torch.randn(1000)
    whole = ops.gated_activation(gate.clone(), up, kind)
    for length in (1, 3, 17, 33):
        for start in range(0, 1000 - length, 13):
            part = slice(start, start + length)
            assert torch.equal(ops.gated_activation(gate[part].clone(), up[part].clone(), kind), whole[part])


def test_softcap() -> None:
    x = torch.linspace(-400, 400, 101)
    close(ops.softcap(x.clone(), 30.0), 30.0 * torch.tanh(x.double() / 30.0))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("length", "turned"), [(8, 8), (12, 8), (64, 48), (2, 2)])
def test_rope_turns_pairs(interleaved: bool, length: int, turned: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(5, 3, length), torch.randn(5, 1, length)
    angle = torch.randn(5, 1, turned // 2)
    cos, sin = angle.cos(), angle.sin()
    first, second = (
        (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(0, turned // 2), slice(turned // 2, turned))
    )
    tables = torch.empty(2, 5, 1, turned)
    tables[0][..., first], tables[0][..., second] = cos, cos
    tables[1][..., first], tables[1][..., second] = -sin, sin
    for heads, other in ((q, k), (k, q)):
        out = heads.clone()
        ops.rope(out, other.clone(), tables[0], tables[1], interleaved)
        expected = heads.double()
        a, b = expected[..., first].clone(), expected[..., second].clone()
        expected[..., first], expected[..., second] = a * cos - b * sin, a * sin + b * cos
        close(out, expected)


def test_rope_of_rows_inside_a_wider_tensor() -> None:
    """q and k may be columns of one fused projection."""
    torch.manual_seed(0)
    both = torch.randn(4, 6 * 8)
    tables = torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    q, k = both[:, :32].clone().view(4, 4, 8), both[:, 32:].clone().view(4, 2, 8)
    ops.rope(q, k, *tables, False)
    fused = both.clone()
    ops.rope(fused[:, :32].view(4, 4, 8), fused[:, 32:].view(4, 2, 8), *tables, False)
    assert torch.equal(fused, torch.cat((q.flatten(1), k.flatten(1)), 1))


@pytest.mark.parametrize("kernel", kernels_for("embedding"), ids=lambda kernel: kernel.family)
@pytest.mark.parametrize(
    "type", [GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K], ids=lambda t: t.name
)
def test_embedding_is_the_rows_of_the_decoded_matrix(kernel: Kernel, type: GGMLType) -> None:
    device = torch.device("cpu")
    reason = kernel.needs(Place(device, type))
    if reason or kernel.prepare is None:
        pytest.skip(reason)
    from ollamapy.gguf.types import row_nbytes

    torch.manual_seed(0)
    data = torch.randint(0, 64, (50, row_nbytes(type, 512)), dtype=torch.uint8)  # small bytes: no NaN, no infinity
    weight = QuantTensor(data, type, (50, 512))
    ids = torch.tensor([0, 49, 7, 7, 48])
    assert torch.equal(kernel.fn(ids, kernel.prepare(weight, device)), weight.dequantize()[ids])
    assert kernel.fn(ids[:0], kernel.prepare(weight, device)).shape == (0, 512)


def _naive_moe(x: Tensor, logits: Tensor, experts: tuple[Tensor, Tensor, Tensor], routing: ops.Routing) -> Tensor:
    gate, up, down = (matrix.double() for matrix in experts)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        scores = logits[row].double().sigmoid() if routing.gating == "sigmoid" else logits[row].double().softmax(0)
        best = scores.argsort(descending=True)[: routing.used]
        weights = scores[best]
        if routing.gating == "softmax_selected":
            weights = logits[row].double()[best].softmax(0)
        elif routing.renormalize:
            weights = weights / weights.sum()
        for weight, expert in zip(weights * (routing.scale or 1.0), best.tolist(), strict=True):
            inner = torch.nn.functional.silu(gate[expert] @ x[row].double()) * (up[expert] @ x[row].double())
            out[row] += weight * (down[expert] @ inner)
    return out


@pytest.mark.parametrize(
    "routing",
    [
        reference.Routing(2),
        reference.Routing(1),
        reference.Routing(6, renormalize=False),
        reference.Routing(3, "sigmoid", scale=2.5),
        reference.Routing(3, "softmax_selected"),
    ],
    ids=str,
)
def test_moe(routing: reference.Routing) -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(9, 16), torch.randn(9, 6)
    experts = torch.randn(6, 12, 16) / 4, torch.randn(6, 12, 16) / 4, torch.randn(6, 16, 12) / 4
    got = reference.moe(x, logits, experts, routing, "silu")
    close(got, _naive_moe(x, logits, experts, routing))
    for rows in (1, 2, 5):
        assert torch.equal(reference.moe(x[:rows], logits[:rows], experts, routing, "silu"), got[:rows])
