"""LoRA adapters beside a model's weights: what merging them would give, several in one batch, and errors that list names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Output, Plan, SamplingParams, Step
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.reader import GGUFFile
from ollamapy.lifecycle.sizes import adapter_bytes
from ollamapy.models.adapter import load_adapter
from ollamapy.models.load import load_model
from tests.models.tiny import Tiny, converted, reference_model, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HEADER: dict[str, Any] = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
PROMPTS = [[5, 9, 2, 7, 11, 5, 9], list(range(3, 40))]


class Case:
    """A tiny llama, two adapters of other ranks, and the files of all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata, self.tensors = converted(Tiny("LlamaForCausalLM"), reference_model(Tiny("LlamaForCausalLM")), folder)
        write_tensors(folder / "base.gguf", self.metadata, self.tensors)
        self.pairs = {
            "one": self.random(4, [f"blk.{layer}.{name}.weight" for layer in range(3) for name in NAMES]),
            "two": self.random(40, ["blk.0.attn_q.weight", "blk.2.ffn_down.weight"]),
        }
        for name, alpha in (("one", 16.0), ("two", 0.0)):
            self.write(name, {**HEADER, "adapter.lora.alpha": alpha}, self.pairs[name])

    def random(self, rank: int, names: list[str]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        found = {}
        for name in names:
            out, into = self.tensors[name].shape
            found[f"{name}.lora_a"] = torch.randn(rank, into, generator=generator) * 0.1
            found[f"{name}.lora_b"] = torch.randn(out, rank, generator=generator) * 0.1
        return found

    def write(self, name: str, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        write_tensors(self.folder / f"{name}.gguf", metadata, tensors)
        return self.folder / f"{name}.gguf"

    def adapters(self, *used: tuple[str, float]) -> tuple[tuple[str, float], ...]:
        return tuple((str(self.folder / f"{name}.gguf"), scale) for name, scale in used)

    def merged(self, *used: tuple[str, float]) -> Path:
        """The base with s * alpha / r * B A added to its matrices."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for name, scale in used:
            factor = scale * (16.0 / 4 if name == "one" else 1.0)  # an alpha of 0 is a factor of 1
            for key in {key[: -len(".lora_a")] for key in self.pairs[name]}:
                tensors[key] += factor * self.pairs[name][f"{key}.lora_b"] @ self.pairs[name][f"{key}.lora_a"]
        write_tensors(self.folder / "merged.gguf", self.metadata, tensors)
        return self.folder / "merged.gguf"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("adapters"))


def engine(path: Path, kernels: str) -> Engine:
    with GGUFFile.open(path) as file:
        model = load_model(file, CPU, kernels=kernels)
    plan = Plan(str(path), num_blocks=64, context_length=256, kv_dtype="f32")
    return Engine(model, plan, load_adapter=lambda path: load_adapter(Path(path), model, CPU))


def run(made: Engine, requests: list[tuple[list[int], tuple[tuple[str, float], ...]]]) -> list[list[Output]]:
    for place, (prompt, adapters) in enumerate(requests):
        made.add(place, prompt, SamplingParams(temperature=0.0, max_tokens=6, logprobs=500, adapters=adapters))
    outputs: list[list[Output]] = [[] for _ in requests]
    while made.has_work:
        for event in made.step():
            assert isinstance(event, Step)
            for output in event.outputs:
                outputs[output.request_id].append(output)
    assert made.check_integrity() == "ok"
    return outputs


def first_logprobs(outputs: list[Output]) -> Tensor:
    """Of the first token generated, by token id."""
    found = torch.full((512,), -1000.0)
    for token, value in outputs[0].logprobs[0].top:
        found[token] = value
    return found


USES = [[("one", 1.0)], [("two", 1.0)], [("one", 0.5), ("two", -2.0)]]


@pytest.mark.parametrize("kernels", ["reference", "csrc"])
@pytest.mark.parametrize("used", USES, ids=str)
def test_beside_the_weights_is_as_merged_into_them(case: Case, kernels: str, used: list[tuple[str, float]]) -> None:
    """Both are float32 sums of at most 128 products in another order: 128 * 2^-24 of a value, through 21 matrices."""
    prompt = PROMPTS[1]
    beside, plain = engine(case.folder / "base.gguf", kernels), engine(case.merged(*used), kernels)
    got = first_logprobs(run(beside, [(prompt, case.adapters(*used))])[0])
    expected = first_logprobs(run(plain, [(prompt, ())])[0])
    known = (got > -100) & (expected > -100)
    scale = float(expected[known].abs().max())
    assert int(known.sum()) > 480 and float((got - expected)[known].abs().max()) < 21 * 128 * 2.0**-24 * scale * 4
    without = first_logprobs(run(beside, [(prompt, ())])[0])
    assert float((without - expected)[known & (without > -100)].abs().max()) > 0.1, "the adapter does something"


def test_memory_is_known_from_the_file(case: Case) -> None:
    """Layers hold rank 4 as 32, and 40 as 64; what is no adapter's file counts nothing, the engine refuses it."""
    with GGUFFile.open(case.folder / "base.gguf") as file:
        model = load_model(file, CPU)
    for name in ("one", "two"):
        path = case.folder / f"{name}.gguf"
        pairs = load_adapter(path, model, CPU)._pairs.values()
        held = sum(half.shape[0] * half.shape[1] * 4 for pair in pairs for half in (pair.a, pair.b))
        assert adapter_bytes(path) == held > 0
    assert adapter_bytes(case.folder / "none.gguf") == adapter_bytes(Path(__file__)) == 0


def test_a_batch_of_two_adapters_and_none(case: Case) -> None:
    """Bit by bit what each gives alone, prefix cache and all; the base keeps its fused pass."""
    uses: list[tuple[tuple[str, float], ...]] = [(), *(case.adapters(*used) for used in USES), case.adapters(("one", 2.0))]
    requests = [(prompt, adapters) for prompt in PROMPTS for adapters in uses]
    together = engine(case.folder / "base.gguf", "csrc")
    found = run(together, requests)
    again = run(together, list(reversed(requests)))[::-1]  # from the prefix cache, where adapters must not meet
    assert together.stats().prefix_hit_tokens > 0
    seen = set()
    for place, request in enumerate(requests):
        (expected,) = run(engine(case.folder / "base.gguf", "csrc"), [request])
        for outputs in (found[place], again[place]):
            assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in expected]
        seen.add(tuple(first_logprobs(expected).tolist()))
    assert len(seen) == len(requests), "each of them is another"


BAD: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("of another kind", {"general.type": "model"}, [], "not a LoRA adapter"),
    ("of another architecture", {"general.architecture": "gemma2"}, [], "for the architecture gemma2, the model is llama"),
    ("of unknown tensors", {}, ["blk.7.attn_q.weight.lora_a", "blk.7.attn_q.weight.lora_b"], r"blk\.7\.attn_q\.weight"),
    ("of the head", {}, ["output.weight.lora_a", "output.weight.lora_b"], r"output\.weight \(not a matrix of the layers\)"),
    ("of half a pair", {}, ["blk.1.attn_q.weight.lora_a"], r"blk\.1\.attn_q\.weight \(has no lora_b\)"),
    ("of wrong shapes", {}, ["blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b"], r"blk\.1\.ffn_up\.weight \(lora_a"),
    ("of other tensors", {}, ["blk.1.ffn_up.weight"], r"no lora_a or lora_b: blk\.1\.ffn_up\.weight"),
]


@pytest.mark.parametrize(("title", "metadata", "names", "error"), BAD, ids=[row[0] for row in BAD])
def test_what_does_not_fit_is_named(case: Case, title: str, metadata: dict[str, Any], names: list[str], error: str) -> None:
    path = case.write("bad", {**HEADER, **metadata}, {name: torch.ones(3, 64) for name in names or ["x.lora_a"]})
    with GGUFFile.open(case.folder / "base.gguf") as file:
        model = load_model(file, CPU)
    with pytest.raises(UnsupportedModel, match=error):
        load_adapter(path, model, CPU)
    made = engine(case.folder / "base.gguf", "csrc")
    ended = run(made, [(PROMPTS[0], ((str(path), 1.0),))])[0][0].finish
    assert ended is not None and ended.reason == "error" and ended.bad_request and made.stats().integrity == "ok"
