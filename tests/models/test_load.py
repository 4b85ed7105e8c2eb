"""Loading: every tensor has its place, other spellings of the same model, memory, and errors that list names."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import make_model
from ollamapy import ops
from ollamapy.env import Settings
from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType, tensor_nbytes
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle.sizes import weight_bytes
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from tests.models.paged import Paged
from tests.models.tiny import Tiny, converted, reference_model, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = list(range(3, 40))
File = tuple[dict[str, Any], dict[str, Tensor]]


def make(tiny: Tiny, folder: Path) -> File:
    return converted(tiny, reference_model(tiny), folder)


def load(file: File, folder: Path, **more: Any) -> Decoder:
    write_tensors(folder / "model.gguf", *file)
    with GGUFFile.open(folder / "model.gguf") as opened:
        return load_model(opened, torch.device("cpu"), **more)


def logits(model: Decoder) -> Tensor:
    return Paged(model).logits({"a": IDS})["a"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> File:
    return make(Tiny("LlamaForCausalLM"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> File:
    tiny = Tiny("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2})
    return make(tiny, tmp_path_factory.mktemp("mixtral"))


def test_missing_and_unknown_tensors_are_listed(llama: File, tmp_path: Path) -> None:
    metadata, tensors = llama
    tensors = dict(tensors)
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_flux.weight"] = torch.zeros(3)
    tensors["blk.2.ffn_down.weight"] = tensors["blk.2.ffn_down.weight"][:, :64]
    with pytest.raises(UnsupportedModel) as error:
        load((metadata, tensors), tmp_path)
    text = str(error.value)
    assert "missing tensors: blk.1.ffn_up.weight;" in text
    assert "unknown tensors: blk.0.attn_flux.weight;" in text
    assert "blk.2.ffn_down.weight (64, 64), not (64, 128)" in text


def test_a_long_list_is_cut(llama: File, tmp_path: Path) -> None:
    metadata, tensors = llama
    with pytest.raises(UnsupportedModel, match="and 16 more") as error:
        load((metadata, {"token_embd.weight": tensors["token_embd.weight"]}), tmp_path)
    assert len(str(error.value)) < 600


def test_a_bias_that_the_architecture_requires(tmp_path: Path) -> None:
    metadata, tensors = make(Tiny("Qwen2ForCausalLM"), tmp_path)
    del tensors["blk.0.attn_k.bias"]
    with pytest.raises(UnsupportedModel, match=r"missing tensors: blk\.0\.attn_k\.bias"):
        load((metadata, tensors), tmp_path)


def test_qk_norms_are_not_optional(tmp_path: Path) -> None:
    metadata, tensors = make(Tiny("Qwen3ForCausalLM"), tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if "_norm" not in name or "attn_norm" in name}
    with pytest.raises(UnsupportedModel, match=r"attn_q_norm\.weight"):
        load((metadata, kept), tmp_path)


def test_vision_tensors_are_left_out_and_said(llama: File, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata, tensors = llama
    more = {"v.blk.0.attn_q.weight": torch.zeros(8, 8), "mm.0.weight": torch.zeros(8)}
    with caplog.at_level(logging.INFO, logger="ollamapy.models.load"):
        model = load((metadata, tensors | more), tmp_path)
    assert "leaving out 2 vision and audio tensors" in caplog.text
    assert torch.equal(logits(model), logits(load(llama, tmp_path)))


def test_fused_qkv_of_any_architecture(llama: File, tmp_path: Path) -> None:
    metadata, tensors = llama
    fused = {name: tensor for name, tensor in tensors.items() if not name.endswith(("attn_q.weight", "attn_k.weight"))}
    for layer in range(3):
        parts = [tensors[f"blk.{layer}.attn_{part}.weight"] for part in "qkv"]
        fused[f"blk.{layer}.attn_qkv.weight"] = torch.cat(parts)
        del fused[f"blk.{layer}.attn_v.weight"]
    assert torch.equal(logits(load((metadata, fused), tmp_path)), logits(load(llama, tmp_path)))


def test_one_tensor_per_expert_as_very_old_files_have(mixtral: File, tmp_path: Path) -> None:
    metadata, tensors = mixtral
    old: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "_exps" in name:
            old |= {name.replace("_exps", f".{expert}"): tensor[expert] for expert in range(4)}
        else:
            old[name] = tensor
    assert torch.equal(logits(load((metadata, old), tmp_path)), logits(load(mixtral, tmp_path)))
    del old["blk.1.ffn_down.2.weight"]
    with pytest.raises(UnsupportedModel, match=r"missing tensors: blk\.1\.ffn_down\.2\.weight$"):
        load((metadata, old), tmp_path)


def test_tied_output(llama: File, tmp_path: Path) -> None:
    metadata, tensors = llama
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    same = tied | {"output.weight": tied["token_embd.weight"]}
    assert torch.equal(logits(load((metadata, tied), tmp_path)), logits(load((metadata, same), tmp_path)))


def test_longrope_without_its_factors(tmp_path: Path) -> None:
    metadata, tensors = make(Tiny("Phi3ForCausalLM"), tmp_path)
    metadata["phi3.rope.scaling.type"] = "longrope"
    with pytest.raises(UnsupportedModel, match=r"missing tensors: rope_factors_long\.weight, rope_factors_short\.weight"):
        load((metadata, tensors), tmp_path)


def test_progress_reaches_the_total_and_memory_is_measured(smollm2_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with GGUFFile.open(smollm2_path) as file:
        model = load_model(
            file, torch.device("cpu"), lambda status, done, total: seen.append((done, total)), kernels="reference"
        )
        in_file = sum(tensor.nbytes for tensor in file.tensors.values())
        embedding = file.tensors["token_embd.weight"].nbytes
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == in_file  # the embedding, which is the output too, is read once
    assert seen == sorted(seen)
    assert model.weight_bytes == 4 * 134_515_008 + embedding  # every weight in float32, and the embedding as it is
    assert ops.chosen()["linear"] == ops.chosen()["embedding"] == "reference"


def test_float32_weights_are_not_copied(llama: File, tmp_path: Path) -> None:
    model = load(llama, tmp_path, kernels="reference")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    address = model.blk[0].attention.attn_q.weight.data.data_ptr()
    assert any(start <= address < end for start, end in spans)


def test_the_file_leaves_memory_once_it_is_packed(smollm2_path: Path) -> None:
    """Norms lie in the mapped file and keep it mapped; its matrices must not stay resident beside their packed copies."""
    with GGUFFile.open(smollm2_path) as file:
        model = load_model(file, torch.device("cpu"))
        size = sum(tensor.nbytes for tensor in file.tensors.values())
    assert model.output_norm.weight.abs().sum() > 0
    maps = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (.*?)^VmFlags", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL)
    address = model.output_norm.weight.data_ptr()
    (mapped,) = (text for start, end, text in maps if int(start, 16) <= address < int(end, 16))
    assert str(smollm2_path.resolve()) in mapped
    (resident,) = re.findall(r"^Rss:\s+(\d+)", mapped, re.MULTILINE)
    assert int(resident) * 1024 < size / 4


def test_states_say_what_the_cache_needs(tmp_path: Path) -> None:
    tiny = Tiny("Gemma2ForCausalLM", {"sliding_window": 16, "query_pre_attn_scalar": 32})
    model = load(make(tiny, tmp_path), tmp_path)
    assert [(s.num_kv_heads, s.key_length, s.value_length, s.window) for s in [block.state for block in model.blk]] == [
        (2, 32, 32, 16),
        (2, 32, 32, 0),
        (2, 32, 32, 16),
    ]


def test_hidden_states_of_the_wanted_rows_only(llama: File, tmp_path: Path) -> None:
    from tests.models.paged import make_batch

    model = load(llama, tmp_path)
    paged = Paged(model)
    expected = paged.run({"a": IDS})["a"]
    batch = make_batch([paged.tables["a"]], [len(IDS)], [len(IDS)], paged.block_size)
    batch.token_ids, batch.logit_rows = torch.tensor(IDS), torch.tensor([36, 0, 5])
    assert torch.equal(model.forward(batch, paged.caches), expected[[36, 0, 5]])


def test_rotary_table_grows(llama: File, tmp_path: Path) -> None:
    """Positions beyond the first table give what a table of that size from the start gives."""
    model = load(llama, tmp_path)
    table = next(iter(model._stages[0]._rotary.values()))
    rope = next(iter(model._stages[0]._rotary))
    positions = torch.tensor([0, 5, 1023, 1024, 5000])
    cos, sin = table.rows(positions, 5001)
    inverse = 1.0 / (rope.base ** (torch.arange(0, rope.dims, 2).double() / rope.dims))
    angles = positions.double()[:, None] * inverse
    torch.testing.assert_close(cos[:, 0, ::2].double(), angles.cos(), atol=5e-4, rtol=0)  # float32 angles of up to 5000
    torch.testing.assert_close(sin[:, 0, 1::2].double(), angles.sin(), atol=5e-4, rtol=0)
    assert torch.equal(sin[:, 0, ::2], -sin[:, 0, 1::2])


@pytest.mark.parametrize("types", [("IQ2_XXS", "IQ1_M", "Q4_K"), ("F16", "TQ2_0", "IQ3_S"), ("Q6_K", "NVFP4", "IQ2_S")])
def test_placement_counts_what_is_loaded(types: tuple[str, str, str], tmp_path: Path) -> None:
    """Types that the CPU kernels hold in another form take more than in the file; rows are filled up to 16."""
    shape, sources = make_model.SHAPES["tiny"], []
    for index, (name, kind, size, _) in enumerate(make_model.tensors(shape, "Q8_0")):
        type = GGMLType[types[index % 3]] if len(size) > 1 else kind
        sources.append((name, type, size, functools.partial(bytes, tensor_nbytes(type, size))))
    write_gguf(tmp_path / "mixed.gguf", make_model.metadata(shape, "Q8_0"), sources)
    with GGUFFile.open(tmp_path / "mixed.gguf") as file:
        counted = weight_bytes(file.tensors, ("cpu",), Settings())["cpu"].total
        model = load_model(file, torch.device("cpu"))
    assert model.weight_bytes <= counted <= 1.03 * model.weight_bytes
