"""Tiny models end to end through the engine on Triton's interpreted kernels, against the reference kernels: logits, tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ollamapy import ops
from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.engine import Engine
from ollamapy.engine.groups import layer_groups
from ollamapy.engine.protocol import KVType, LayerGroup, Plan, SamplingParams, Step
from ollamapy.engine.runner import KV_DTYPES
from ollamapy.env import Settings
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle.sizes import weight_bytes
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from ollamapy.quant.forms import CODED
from ollamapy.triton_kernels import tuning
from tests.engine.device import Emulated
from tests.models.paged import Paged
from tests.models.tiny import Tiny, converted, reference_model
from tests.triton.data import random_weight

# exp of a large number is infinite and its inverse zero, as on a GPU; numpy, which interprets, says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

SMALL = {"num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
MODELS = {
    "llama": Tiny("LlamaForCausalLM", SMALL),
    "gemma3": Tiny(
        "Gemma3ForCausalLM",
        {
            **SMALL,
            "sliding_window": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3_ROPE,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3moe": Tiny(
        "Qwen3MoeForCausalLM",
        {**SMALL, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
}
LIMIT = 2e-5
"""Of max |difference| / max |logit|: both sides compute in float32, in other orders. Chains of n roundings stray by less than
8 sqrt(n) 2^-24; of the layers' sums of 64 to 128 terms, about ten in a row, that is 10 * 8 * sqrt(128) * 2^-24 = 5e-5, halved
because errors of one layer do not all add. Observed: 1e-6."""


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of 8 columns as for one of 64."""
    wide = tuning.Tile(32, 128, 4, 4, 3)
    table = dataclasses.replace(
        tuning.of(torch.device("cpu")), matvec=tuning.Tile(4, 64, 4, 4, 1), tiles=(wide,), matvec_pairs=4, split_keys=32
    )
    monkeypatch.setattr(tuning, "of", lambda device: table)


def write(tiny: Tiny, folder: Path, types: Sequence[GGMLType] = ()) -> Path:
    """The model with quantized matrices, of `types` in turn where there are some; what its values are does not matter here."""
    metadata, tensors = converted(tiny, reference_model(tiny), folder)
    entries, turns = [], itertools.cycle(types)
    for index, (name, tensor) in enumerate(tensors.items()):
        type, data = GGMLType.F32, tensor.contiguous().numpy().data.cast("B")
        if tensor.dim() > 1 and "router" not in name and "gate_inp" not in name:
            type = GGMLType.Q5_0 if name.endswith("attn_v.weight") else GGMLType.Q8_0
            type = next(turns, type)
            weight = random_weight(type, *tensor.shape, seed=index)
            data = weight.data.numpy().data.cast("B")
        entries.append((name, type, tuple(tensor.shape), data))
    write_gguf(folder / "tiny.gguf", metadata, entries)
    return folder / "tiny.gguf"


def load(path: Path, kernels: str, precise: bool = False) -> Decoder:
    with GGUFFile.open(path) as file:
        return load_model(file, torch.device("cpu"), kernels=kernels, precise=precise)


def feed(model: Decoder, kv_dtype: KVType = "f32") -> dict[str, torch.Tensor]:
    """Two prompts, then a decoding step of both, then one beside a later part of the other's prompt."""
    paged = Paged(model, dtype=KV_DTYPES[kv_dtype])
    found = {f"prompt {name}": out for name, out in paged.logits({"a": range(3, 13), "b": [5, 80]}).items()}
    found |= {f"decoded {name}": out for name, out in paged.logits({"a": [7], "b": [9]}).items()}
    return found | {f"mixed {name}": out for name, out in paged.logits({"b": range(40, 46), "a": [11]}).items()}


def generate(
    model: Decoder,
    groups: tuple[LayerGroup, ...] = (),
    device: Accelerator | None = None,
    count: int = 2,
    max_tokens: int = 2,
    kv_dtype: KVType = "f16",
) -> dict[int, list[int]]:
    plan = Plan("tiny", num_blocks=20, block_size=16, context_length=64, groups=groups, kv_dtype=kv_dtype)
    engine = Engine(model, plan, ops.chosen(), accelerator=device)
    assert {cache.key.dtype for cache in engine.runner.caches} == {KV_DTYPES[kv_dtype]}
    tokens: dict[int, list[int]] = {}
    for request, prompt in enumerate([[10, 11, 12], [3], [7, 8]][:count]):
        engine.add(request, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, Step)
            for output in event.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    path = write(MODELS[name], tmp_path)
    reference = load(path, "reference")
    want, tokens = feed(reference), generate(reference)
    model = load(path, "triton")
    assert type(model._stages[0]._stack).__module__ == "ollamapy.triton_kernels.stack"
    for step, got in feed(model).items():
        error = (got - want[step]).abs().max() / want[step].abs().max()
        assert error < LIMIT, (step, float(error))
    assert generate(model) == tokens
    if name == "gemma3":  # whose layers have block tables of their own
        groups = layer_groups(model.config.windows, 64)
        assert len(groups) == 2 and generate(model, groups) == tokens


def test_fp8_cache(tmp_path: Path) -> None:
    """e4m3 keeps 3 bits behind the first, float16 10: its errors are 2^7 times as large, and so are the logits' as far as these
    go straight within them; they bend, for a third to half as much again. The reference says the same but for values that lie
    in the middle between two of fp8, as far as float32 can tell: one in 10^5, hence one or none of these 10^4."""
    path = write(MODELS["llama"], tmp_path)
    reference = load(path, "reference")
    want, told, tokens = feed(reference), feed(reference, "fp8"), generate(reference, max_tokens=4, kv_dtype="fp8")
    model = load(path, "triton")
    off = {kind: spread(feed(model, kind), want) for kind in ("f16", "fp8")}
    assert 2**7 / 3 < off["fp8"] / off["f16"] < 2**7 * 1.5, off
    assert spread(feed(model, "fp8"), told) < off["fp8"] / 8
    assert generate(model, device=Emulated(), max_tokens=4, kv_dtype="fp8") == tokens  # recorded from the third on


def spread(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Root of the mean square of all logits' differences."""
    return float(torch.cat([(got[name] - want[name]).flatten() for name in want]).square().mean().sqrt())


def test_types_of_few_values(tmp_path: Path) -> None:
    """All of them in one model, with experts: what a GPU will hold is what placement counts, and far less than 16 bits."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_experts": 2, "head_dim": 64}
    path = write(Tiny("Qwen3MoeForCausalLM", {**MODELS["qwen3moe"].config, **sizes}), tmp_path, [*CODED])
    want = Paged(load(path, "reference")).logits({"a": range(3, 13), "b": [5]})
    model = load(path, "triton")
    for name, got in Paged(model).logits({"a": range(3, 13), "b": [5]}).items():
        error = (got - want[name]).abs().max() / want[name].abs().max()
        assert error < LIMIT, (name, float(error))
    with GGUFFile.open(path) as file:
        assert {tensor.type for tensor in file.tensors.values()} >= set(CODED)
        counted = weight_bytes(file.tensors, ("cuda",), Settings())["cuda"].total
    assert counted == model.weight_bytes


def test_precise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose activations are of 16 bits: precise weights are multiplied in float32 there too, the others are not."""
    path = write(MODELS["qwen3moe"], tmp_path)

    def prompts(model: Decoder) -> dict[str, torch.Tensor]:
        return Paged(model).logits({"a": range(3, 13), "b": [5, 80]})

    def error(precise: bool) -> float:
        model = load(path, "triton", precise)
        assert ops.chosen()["linear"] == ops.chosen()["stack"] == "triton"
        return max(float((got - want[name]).abs().max() / want[name].abs().max()) for name, got in prompts(model).items())

    want = prompts(load(path, "reference"))
    kind = {False: torch.float16, True: torch.float32}
    monkeypatch.setattr(tuning, "activations", lambda device, precise=False: kind[precise])
    assert error(precise=True) < LIMIT < error(precise=False)


def test_recorded_steps(tmp_path: Path) -> None:
    """Through buckets whose last row is padding, tokens fed from step to step: the tokens of the reference, step by step."""
    path = write(MODELS["llama"], tmp_path)
    want = generate(load(path, "reference"), count=3, max_tokens=6)
    device = Emulated()
    assert generate(load(path, "triton"), device=device, count=3, max_tokens=6) == want
    assert device.num_recorded == 1


def test_batch_invariant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLLAMAPY_BATCH_INVARIANT: the bits of a sequence alone are those in a batch, with experts and float matrices. By default
    they are not: one row and three take other kernels."""
    path = write(MODELS["qwen3moe"], tmp_path)

    def equal() -> bool:
        model = load(path, "triton")
        together, alone = Paged(model), Paged(model, seed=1)
        steps = ({"a": [3, 4, 5], "b": [5, 80]}, {"a": [7], "b": [9]})
        pairs = [(together.logits(fed)["a"], alone.logits({"a": fed["a"]})["a"]) for fed in steps]
        return all(torch.equal(*pair) for pair in pairs)

    assert not equal()
    table = tuning.one_path(tuning.of(torch.device("cpu")))
    monkeypatch.setattr(tuning, "invariant", lambda: True)
    monkeypatch.setattr(tuning, "of", lambda device: table)
    assert equal()


def test_op_by_op(tmp_path: Path) -> None:
    """As layers run that the stack does not take."""
    path = write(MODELS["qwen3moe"], tmp_path)
    want = Paged(load(path, "reference")).logits({"a": range(5)})["a"]
    model = load(path, "triton")
    model._stages[0]._stack = None
    got = Paged(model).logits({"a": range(5)})["a"]
    assert (got - want).abs().max() / want.abs().max() < LIMIT
