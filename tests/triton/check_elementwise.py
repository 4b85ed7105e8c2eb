"""Norms and activations, interpreted, against ollamapy.reference."""

from __future__ import annotations

import os

import pytest
import torch

from ollamapy import reference, triton_kernels
from ollamapy.gguf.types import GGMLType
from ollamapy.triton_kernels import activation, layout, linear, norm
from tests.triton.data import random_weight

# exp of a large number is infinite and its inverse zero, as on a GPU; numpy, which interprets, says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (2, 3, 40), (5, 257)], ids=str)
def test_norms(shape: tuple[int, ...]) -> None:
    x, weight, bias = randn(*shape), randn(shape[-1]), randn(shape[-1])
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=1e-6, atol=1e-6)
    for b in (None, bias):
        want = reference.layer_norm(x, weight, b, 1e-5)
        torch.testing.assert_close(norm.layer_norm(x, weight, b, 1e-5), want, rtol=2e-6, atol=2e-6)
    residual, total = x.clone(), x + 2 * x
    torch.testing.assert_close(
        norm.add_norm(2 * x, residual, 1e-5, weight), reference.rms_norm(total, weight, 1e-5), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(residual, total)
    branch = reference.rms_norm(2 * x, bias, 1e-5)
    residual = x.clone()
    got = norm.add_norm(2 * x, residual, 1e-5, weight, bias)
    torch.testing.assert_close(got, reference.rms_norm(x + branch, weight, 1e-5), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(residual, x + branch, rtol=1e-6, atol=1e-6)
    alone = x.clone()
    assert norm.add_norm(2 * x, alone, 1e-5, None, bias) is alone and torch.equal(alone, residual)


def test_half_norm() -> None:
    x, weight = randn(4, 130, dtype=torch.float16), randn(130)
    want = reference.rms_norm(x.float(), weight, 1e-6)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6).float(), want, rtol=2**-10, atol=2**-14)
    assert norm.rms_norm(x[:0], weight, 1e-6).shape == (0, 130)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 1500)], ids=str)
def test_gated_activation(shape: tuple[int, int], kind: reference.Activation) -> None:
    """Also of the halves of one projection's rows; gates far from zero saturate."""
    joined = 20 * randn(shape[0], 2 * shape[1])
    gate, up = joined.split(shape[1], 1)
    want = reference.gated_activation(gate.clone(), up, kind)
    torch.testing.assert_close(activation.gated_activation(gate, up, kind), want, rtol=1e-5, atol=1e-5)
    assert activation.gated_activation(gate[:0], up[:0], kind).shape == (0, shape[1])


def test_softcap() -> None:
    x = 100 * randn(3, 700)
    want = reference.softcap(x.clone(), 30.0)
    got = activation.softcap(x, 30.0)
    assert got is x
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the table of the interpreter")
def test_table() -> None:
    """Every op is where the table says, and takes what the reference's takes first."""
    for op in triton_kernels.OPS:
        function = triton_kernels.load(op)
        original = getattr(reference, op, None)
        if callable(original):
            code, other = function.__code__, original.__code__
            needed = other.co_argcount - len(original.__defaults__ or ())
            assert code.co_varnames[:needed] == other.co_varnames[:needed], op
    for op in triton_kernels.PREPARE:
        assert triton_kernels.load(op, triton_kernels.PREPARE).__code__.co_varnames[:2] == ("weight", "device")
    assert triton_kernels.objection(torch.device("cpu")) == ""  # because it is interpreted
    assert triton_kernels.objection(torch.device("cuda")) == "" and "for mps" in triton_kernels.objection(torch.device("mps"))


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 1056)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_quantize(shape: tuple[int, int], normed: bool) -> None:
    """Codes within half a step of the values, the largest of a group at 127; a group of zeros is zeros."""
    x, weight = randn(*shape), randn(shape[1])
    x[0, :32] = 0.0
    want = reference.rms_norm(x, weight, 1e-5) if normed else x
    got = norm.quantize(x, weight if normed else None, 1e-5)
    codes = got.codes.view(shape[0], -1, 16, 2).transpose(2, 3).float()  # (n, groups, halves, 16)
    values = codes.flatten(2) * got.steps.unsqueeze(2)
    groups = want.view(shape[0], -1, 32)
    torch.testing.assert_close(got.steps, groups.abs().amax(2) / 127, rtol=2e-6, atol=1e-9)
    assert ((values - groups).abs() <= got.steps.unsqueeze(2) * 0.50001 + 1e-9).all()
    torch.testing.assert_close(got.sums, codes.sum(3) * got.steps.unsqueeze(2), rtol=1e-6, atol=1e-6)
    assert not values[0, 0].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_int8(bad: float) -> None:
    """In its row's products as well; other rows keep their bits."""
    x = randn(3, 96)
    clean, weight = norm.quantize(x), layout.pack(random_weight(GGMLType.Q8_0, 16, 96))
    whole = linear.int8_matmul(x, weight, torch.empty(3, 16))
    x[1, 40] = bad
    got = norm.quantize(x)
    assert got.steps[1].isnan().tolist() == [False, True, False]
    assert torch.equal(got.codes[[0, 2]], clean.codes[[0, 2]]) and torch.equal(got.steps[[0, 2]], clean.steps[[0, 2]])
    products = linear.int8_matmul(x, weight, torch.empty(3, 16))
    assert products[1].isnan().all() and torch.equal(products[[0, 2]], whole[[0, 2]])
