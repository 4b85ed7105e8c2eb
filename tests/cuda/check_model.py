"""Tiny models through the engine on the CUDA kernels (on the CPU), with Triton's attention interpreted: against a float32 model
whose matmuls round their activations to int8 too, and each request alone against itself in a batch, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollamapy import cuda_kernels, kernel_table, reference
from ollamapy.gguf.types import GGMLType
from ollamapy.kernel import Kernel
from ollamapy.models.decoder import Decoder
from ollamapy.triton_kernels import tuning
from tests.cuda.data import int8_rows
from tests.models.paged import Paged
from tests.models.tiny import Tiny
from tests.triton.check_model import GEMMA3_ROPE, SMALL, _wide_tiles, feed, generate, load, write

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]
wide_tiles = _wide_tiles  # a fixture, here too

MODELS = {
    "llama": Tiny("LlamaForCausalLM", SMALL),
    "gemma3": Tiny(
        "Gemma3ForCausalLM",
        {
            **SMALL,
            "sliding_window": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
LIMIT = 0.01
"""Of max |difference| / max |logit|. The models differ by float32's rounding, 1e-6, which moves an activation that lies within
1e-6 * 127 of a tie to the next code: one in 4000. That changes a product of K = 64 by a step of 1 / 127 of the group's largest,
2.3 times a usual value: 2.3 / 127 / sqrt(64) = 0.2 % of a usual product. A row meets fewer than four of them."""


def quantizing(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    codes, scale = int8_rows(x)
    return reference.linear((codes * scale.unsqueeze(-1)).flatten(1), weight, bias)


def served(kernel: Kernel) -> Kernel:
    """A row of the table, for the CPU. `linear` of the reference rounds activations as the CUDA kernels do."""
    if kernel.family == "csrc":
        return replace(
            kernel, needs=lambda place: cuda_kernels.objection(place.type) if place.type is not None else "", devices=()
        )
    if kernel.family == "reference" and kernel.op == "linear":
        return replace(kernel, fn=quantizing)
    return replace(kernel, devices=())


@pytest.fixture(autouse=True)
def _on_this_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's rows of the table instead of the CPU's."""
    kept = [kernel for kernel in kernel_table.TABLE if kernel.family != "csrc" or kernel.devices == ("cuda",)]
    monkeypatch.setattr(kernel_table, "TABLE", tuple(map(served, kept)))


def model_of(name: str, folder: Path, kernels: str) -> Decoder:
    return load(write(MODELS[name], folder), kernels)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = feed(model_of(name, tmp_path, "reference"))
    model = model_of(name, tmp_path, "csrc")
    calls: dict[str, int] = {}
    library = cuda_kernels.kernels()

    class Counted:
        def __getattr__(self, op: str) -> Any:
            calls[op] = calls.get(op, 0) + 1
            return getattr(library, op)

    monkeypatch.setattr(cuda_kernels, "kernels", Counted)
    for step, got in feed(model).items():
        error = (got - want[step]).abs().max() / want[step].abs().max()
        assert error < LIMIT, (step, float(error))
    # Three steps of two layers, each with the heads of two sequences apart. Nothing reads a norm after the last layer, but
    # where branches are normed it adds one. Int8 rows that no epilogue makes: attention's, and those before a head.
    norms = 2 * 2 + (name == "gemma3")
    assert calls == {"linear": 3 * (2 * 5 + 2), "norm": 3 * norms, "quantize": 3 * (2 * 2 + 2), "rope": 3 * 2}


def test_alone_and_in_a_batch(tmp_path: Path) -> None:
    """Prompts of one and ten tokens, decoding, and a later part of a prompt: the bits do not depend on who is there."""
    model = model_of("llama", tmp_path, "csrc")
    together, one, other = (Paged(model, seed=seed) for seed in range(3))
    for fed in ({"a": range(3, 13), "b": [5, 80]}, {"a": [7], "b": [9]}, {"b": range(40, 46), "a": [11]}):
        got = together.logits(fed)
        assert torch.equal(got["a"], one.logits({"a": fed["a"]})["a"])
        assert torch.equal(got["b"], other.logits({"b": fed["b"]})["b"])


def test_many_rows_are_tritons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers over 12 rows and a head over ten have the bits of Triton's products; a head over two, and other steps, do not."""
    table = replace(tuning.of(torch.device("cpu")), mma_rows=7)
    monkeypatch.setattr(tuning, "of", lambda device: table)
    want = feed(model_of("gemma3", tmp_path, "triton"))
    for step, got in feed(model_of("gemma3", tmp_path, "csrc")).items():
        assert torch.equal(got, want[step]) == (step == "prompt a"), step


def test_engine(tmp_path: Path) -> None:
    """Two requests at once and one after the other."""
    tokens = generate(model_of("llama", tmp_path, "csrc"))
    assert sorted(tokens) == [0, 1] and all(len(found) == 2 for found in tokens.values())


def test_thresholds() -> None:
    """From the table of the architecture, and never beyond what the kernel takes."""
    for path in tuning.FOLDER.glob("*.json"):
        table = tuning.read(path.stem)
        assert 0 <= table.dp4a_rows <= cuda_kernels.MATVEC_MOST
        assert table.dp4a_rows < table.mma_rows < tuning.one_path(table).mma_rows
    assert cuda_kernels.matvec_rows(torch.device("cpu")) == tuning.read("sm_90").dp4a_rows


def test_types() -> None:
    assert cuda_kernels.objection(GGMLType.Q4_K) == "" and "IQ2_XXS" in cuda_kernels.objection(GGMLType.IQ2_XXS)
