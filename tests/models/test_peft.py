"""LoRA adapters that come as PEFT writes them: what the created model computes is what merging them would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ollamapy.convert.safetensors import SafetensorsFile
from ollamapy.errors import BadRequest, OllamapyError
from ollamapy.store.files import model_files
from ollamapy.store.library import Library
from tests.models.test_adapter import engine, first_logprobs, run
from tests.models.tiny import Tiny, converted, reference_model, write_tensors
from tests.test_create import create, opened, upload

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PROMPT = list(range(3, 40))


class Case:
    """A tiny base model in a library as "base", and PEFT folders beside it."""

    def __init__(self, folder: Path, cls: str) -> None:
        self.folder, self.tiny = folder, Tiny(cls)
        self.model = reference_model(self.tiny)
        (folder / "hf").mkdir()
        write_tensors(folder / "base.gguf", *converted(self.tiny, self.model, folder / "hf"))
        self.library = Library(folder / "models")
        self.base = upload(self.library, folder / "base.gguf")
        create(self.library, model="base", files={"base.gguf": self.base})

    def halves(self, rank: int) -> dict[str, Tensor]:
        """By module name with .A or .B; the last layer has twice the rank."""
        generator = torch.Generator().manual_seed(rank)
        found = {}
        for name, module in self.model.named_modules():
            if name.endswith(MODULES):
                own = rank * (2 if ".2." in name else 1)
                out, into = module.weight.shape
                found[f"{name}.A"] = torch.randn(own, into, generator=generator) * 0.1
                found[f"{name}.B"] = torch.randn(out, own, generator=generator) * 0.1
        return found

    def write(self, halves: dict[str, Tensor], dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, str]:
        """Name -> digest of the uploaded files of a PEFT folder."""
        folder = self.folder / "peft"
        folder.mkdir(exist_ok=True)
        named = {f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight": half.to(dtype) for name, half in halves.items()}
        save_file(named, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 12, **config}))
        return {name: upload(self.library, path) for name, path in model_files(folder).items()}

    def merged(self, halves: dict[str, Tensor], scales: dict[str, float]) -> Path:
        """The checkpoint with scale * B A added, converted as a whole."""
        other = reference_model(self.tiny)
        with torch.no_grad():
            for name, module in other.named_modules():
                if f"{name}.A" in halves:
                    module.weight += scales[name] * halves[f"{name}.B"] @ halves[f"{name}.A"]
        (self.folder / "merged").mkdir(exist_ok=True)
        write_tensors(self.folder / "merged.gguf", *converted(self.tiny, other, self.folder / "merged"))
        return self.folder / "merged.gguf"


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Gemma3ForCausalLM"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("peft"), request.param)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"use_rslora": True}),
        (torch.float16, {"alpha_pattern": {"self_attn.q_proj": 40, "layers.1.mlp.down_proj": 3}}),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_it_computes_what_merging_gives(case: Case, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Float32 sums of at most 128 products in another order: 128 * 2^-24 of a value, through 21 matrices."""
    halves = {name: half.to(dtype).float() for name, half in case.halves(4).items()}
    scales = {}
    for name in (key[:-2] for key in halves if key.endswith(".A")):
        rank = halves[f"{name}.A"].shape[0]
        alpha = next((value for key, value in config.get("alpha_pattern", {}).items() if name.endswith(key)), 12)
        scales[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    lines = create(case.library, model="adapted", adapters=case.write(halves, dtype, **config), **{"from": "base"})
    assert "converting adapter" in lines and lines[-1] == "success"
    (adapter,) = opened(case.library, "adapted").adapter_paths
    beside = engine(case.folder / "base.gguf", "reference")
    got = first_logprobs(run(beside, [(PROMPT, ((str(adapter), 1.0),))])[0])
    expected = first_logprobs(run(engine(case.merged(halves, scales), "reference"), [(PROMPT, ())])[0])
    known = (got > -100) & (expected > -100)
    scale = float(expected[known].abs().max())
    assert int(known.sum()) > 480 and float((got - expected)[known].abs().max()) < 21 * 128 * 2.0**-24 * scale * 4
    without = first_logprobs(run(beside, [(PROMPT, ())])[0])
    assert float((without - expected)[known & (without > -100)].abs().max()) > 0.1, "the adapter does something"


def test_of_files_of_one_request(case: Case) -> None:
    """The base as a GGUF file beside it, and the same bytes again give the same blob."""
    adapters = case.write(case.halves(4))
    create(case.library, model="one", files={"base.gguf": case.base}, adapters=adapters)
    create(case.library, model="two", adapters=adapters, **{"from": "base"})
    assert opened(case.library, "one").adapter_paths == opened(case.library, "two").adapter_paths


@pytest.mark.parametrize(
    ("config", "change", "error"),
    [
        ({"use_dora": True}, {}, "adapters with use_dora are not supported"),
        ({"bias": "all", "peft_type": "LOHA"}, {}, "adapters with peft_type LOHA, bias all are not supported"),
        ({"lora_alpha": "x"}, {}, "adapter_config.json: "),
        ({}, {"lm_head.A": (4, 64), "lm_head.B": (512, 4)}, "changes lm_head, which is not a matrix of a layer"),
        ({}, {"model.layers.0.mlp.up_proj.A": (4, 64)}, "model.layers.0.mlp.up_proj (only one half)"),
        ({}, {"model.layers.9.mlp.up_proj.A": (4, 64), "model.layers.9.mlp.up_proj.B": (128, 4)}, "blk.9.ffn_up.weight.lora_a"),
        ({}, {"model.layers.0.mlp.up_proj.A": (4, 32), "model.layers.0.mlp.up_proj.B": (128, 4)}, "(4, 32) for a matrix"),
        ({}, {"model.layers.0.mlp.up_proj.A": (4, 64), "model.layers.0.mlp.up_proj.B": (128, 5)}, "are no pair"),
    ],
)
def test_what_cannot_be_carried_over_is_named(case: Case, config: dict[str, Any], change: dict[str, Any], error: str) -> None:
    halves = {**case.halves(4), **{name: torch.zeros(shape) for name, shape in change.items()}}
    with pytest.raises(OllamapyError) as raised:
        create(case.library, model="m", adapters=case.write(halves, **config), **{"from": "base"})
    assert error in str(raised.value) and raised.value.status == 400
    assert case.library.resolve(opened(case.library, "base").name) and not list((case.folder / "models/blobs").glob("*tmp*"))


def test_without_its_configuration(case: Case) -> None:
    adapters = case.write(case.halves(4))
    assert model_files(case.folder / "peft" / "adapter_model.safetensors").keys() == adapters.keys(), "what is beside a file"
    del adapters["adapter_config.json"]
    with pytest.raises(BadRequest, match=r"needs its adapter_config\.json beside it: adapter_model\.safetensors"):
        create(case.library, model="m", adapters=adapters, **{"from": "base"})


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,8]}}',
        b"[",
    ],
)
def test_damaged_files(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BadRequest, match="mine: not a good safetensors file"):
        SafetensorsFile(path, "mine").tensor("a")
    path.write_bytes(b"\xff" * 12)
    with pytest.raises(BadRequest, match="longer than the file"):
        SafetensorsFile(path, "mine")
