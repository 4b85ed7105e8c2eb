"""Placement by numbers alone, and what the devices module reads from the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ollamapy.api import options as api_options
from ollamapy.engine.protocol import Plan
from ollamapy.env import Settings
from ollamapy.errors import EngineError
from ollamapy.gguf.reader import TensorInfo
from ollamapy.gguf.types import GGMLType
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.fit import Placement
from ollamapy.lifecycle.gpus import GPU
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.placement import DoesNotFit, plan
from ollamapy.lifecycle.sizes import Beside, WeightBytes, weight_bytes
from ollamapy.models.config import ModelConfig

GIB = 1 << 30


def config(trained: int = 131072, **more: object) -> ModelConfig:
    """Llama 3.1 8B: 128 KiB of f16 KV per token."""
    keys = {
        "context_length": trained, "embedding_length": 4096, "block_count": 32, "feed_forward_length": 14336,
        "attention.head_count": 32, "attention.head_count_kv": 8, "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 128256, **more,
    }  # fmt: skip
    return ModelConfig.from_gguf({"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}})


def cpu(free: float, cores: int = 4) -> Devices:
    return Devices(cores, 64 * GIB, int(free * GIB))


def gpus(*sizes: tuple[float, float], free: float = 64) -> Devices:
    """GPUs of (total, free) GiB."""
    cards = tuple(GPU(i, f"card {i}", int(total * GIB), int(left * GIB), (9, 0)) for i, (total, left) in enumerate(sizes))
    return Devices(8, 64 * GIB, int(free * GIB), cards)


def sizes(cpu: float, cuda: float, layers: int = 32) -> dict[str, WeightBytes]:
    """GiB of weights by kind of device; what belongs to no layer is as large as two of them."""

    def split(total: float) -> WeightBytes:
        each = int(total * GIB) // (layers + 2)
        return WeightBytes((each,) * layers, int(total * GIB) - layers * each)

    return {"cpu": split(cpu), "cuda": split(cuda)}


def place(
    devices: Devices, weights: float = 5, options: dict[str, object] | None = None, draft: Beside | None = None, **settings: Any
) -> Placement:
    wanted = RunnerOptions.of(options or {})
    return plan(config(), sizes(weights, weights), devices, Settings(**settings), wanted, "m.gguf", draft)


def test_a_request_may_have_the_context_that_all_blocks_hold() -> None:
    assert place(cpu(32)).plan.max_context == 8 * 4096
    assert place(cpu(32), num_parallel=1).plan.max_context == place(cpu(32), num_parallel=1).plan.context_length == 4096
    assert place(cpu(64), options={"num_ctx": 65536}).plan.max_context >= 65536
    scaled = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 8192}
    assert _planned(config(**scaled)).max_context == 8192, "its factors were chosen for short contexts"
    assert _planned(config(**scaled), num_ctx=16384).max_context == 131072
    assert _planned(config(**{**scaled, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})).max_context == 32768


def _planned(model: ModelConfig, **options: object) -> Plan:
    return plan(model, sizes(5, 5), cpu(64), Settings(), RunnerOptions.of(options)).plan


def test_a_cpu_plan() -> None:
    placed = place(cpu(32))
    made = placed.plan
    assert (made.model_path, made.draft_path, made.device, made.num_threads) == ("m.gguf", "", "cpu", 4)
    assert (made.context_length, made.kv_dtype, made.block_size, made.max_batch_tokens) == (4096, "f16", 16, 512)
    assert made.num_blocks == 8 * 4096 // 16, "8 contexts of 0.5 GiB are less than half of what is left"
    assert placed.kv_bytes == 4 * GIB
    assert made.prefix_folder.endswith("/prefixes") and made.prefix_bytes == Settings().prefix_cache_bytes
    assert place(cpu(32), prefix_cache_bytes=0).plan.prefix_folder == ""
    assert placed.notes == () and not placed.spilled
    assert placed.total_bytes < 10 * GIB


@pytest.mark.parametrize(("kind", "per_token"), [("f16", 131072), ("q8_0", 69632), ("f32", 262144), ("fp8", 65536)])
def test_a_gpu_plan_leaves_the_number_of_blocks_open(kind: str, per_token: int) -> None:
    """The engine measures: between one context and as many as are wanted, beside what the user wants left free."""
    settings = {"kv_cache_type": kind, "gpu_overhead": 2 * GIB, "flash_attention": "0"}  # accepted: there is only one attention
    placed = place(gpus((24, 23)), options={"num_ctx": 4096}, **settings)
    made = placed.plan
    assert (made.device, made.kv_dtype, made.least_blocks, made.most_blocks) == ("cuda:0", kind, 256, 32 * 256)
    assert made.reserve_bytes == (2 * GIB) + (457 << 20)
    assert made.least_blocks <= made.num_blocks <= made.most_blocks
    assert placed.kv_bytes == made.num_blocks * 16 * per_token
    assert placed.total_bytes <= 23 * GIB - made.reserve_bytes
    assert place(gpus((24, 23)), num_parallel=2, options={"num_ctx": 4096}).plan.most_blocks == 2 * 256
    assert place(cpu(32)).plan.most_blocks == 0


def test_a_draft_model_takes_its_share() -> None:
    """As large as the model itself: weights and a pool of blocks of its own."""
    draft = Beside("d.gguf", config(), sizes(2, 2))
    alone, placed = place(cpu(32)), place(cpu(32), draft=draft)
    assert (placed.plan.draft_path, placed.plan.num_draft_blocks) == ("d.gguf", placed.plan.num_blocks)
    assert placed.weight_bytes == 7 * GIB and placed.kv_bytes == 2 * alone.kv_bytes
    assert place(cpu(10)).plan.context_length == 4096
    with pytest.raises(DoesNotFit):
        place(cpu(7.5), draft=draft)


@pytest.mark.parametrize(
    ("free", "settings", "contexts", "notes"),
    [
        (64, {}, 8, 0),
        (64, {"num_parallel": 1}, 1, 0),
        (64, {"num_parallel": 20}, 20, 0),
        (9, {}, 3, 0),  # 3.3 GiB are left; half of that for 0.5 GiB each
        (9, {"num_parallel": 20}, 3, 1),
        (6.3, {}, 1, 0),  # 0.6 GiB are left: one context, though it is more than half
        (9, {"kv_cache_type": "f32"}, 1, 0),
        (9, {"kv_cache_type": "BF16"}, 3, 0),
        (9, {"kv_cache_type": "q8_0"}, 6, 0),
        (9, {"kv_cache_type": "q4_0"}, 3, 1),
        (9, {"kv_cache_type": "fp8_e5m2"}, 3, 1),
        (9, {"precise": True}, 1, 0),
        (9, {"precise": True, "kv_cache_type": "q8_0"}, 1, 1),
    ],
)
def test_kv_room(free: float, settings: dict[str, Any], contexts: int, notes: int) -> None:
    placed = place(cpu(free), **settings)
    assert placed.plan.num_blocks == contexts * 256
    assert len(placed.notes) == notes
    per_token = {"f16": 131072, "bf16": 131072, "f32": 262144, "q8_0": 69632}[placed.plan.kv_dtype]
    assert placed.kv_bytes == contexts * 4096 * per_token
    assert placed.plan.precise == settings.get("precise", False)
    assert placed.total_bytes <= free * GIB


@pytest.mark.parametrize(
    ("options", "environment", "trained", "expected"),
    [
        ({}, 0, 131072, 4096),
        ({}, 0, 2048, 2048),
        ({}, 1024, 131072, 1024),
        ({"num_ctx": 8192}, 1024, 131072, 8192),
        ({"num_ctx": 8192}, 0, 2048, 2048),
        ({"num_ctx": 1}, 0, 131072, 4),
        ({"num_ctx": 0}, 0, 131072, 4),  # explicit
        ({"num_ctx": None}, 0, 131072, 4096),
        ({"num_ctx": 100}, 0, 131072, 100),
        ({}, 2, 131072, 4),
    ],
)
def test_context_length(options: dict[str, object], environment: int, trained: int, expected: int) -> None:
    settings = Settings(context_length=environment)
    made = plan(config(trained), sizes(1, 1), cpu(60), settings, RunnerOptions.of(options)).plan
    assert made.context_length == expected
    assert made.num_blocks * made.block_size >= expected
    assert made.num_blocks == 8 * -(-expected // 16)


@pytest.mark.parametrize(
    ("sizes", "overhead", "expected"),
    [
        ([(47, 47)], 0, 131072),  # 262144, above what the model was trained for
        ([(24, 23.9)], 0, 32768),
        ([(24, 23.9)], 2, 4096),
        ([(16, 16), (16, 16)], 0, 32768),
        ([(22, 22)], 0, 4096),
        ([(24, 8)], 0, 4096),  # lowered: 32768 do not fit in what is free
    ],
)
def test_automatic_context_goes_by_all_gpus(sizes: list[tuple[float, float]], overhead: int, expected: int) -> None:
    placed = place(gpus(*sizes), gpu_overhead=overhead * GIB)
    assert placed.plan.device == "cuda:0"
    assert placed.plan.context_length == expected
    assert placed.plan.max_batch_tokens == {131072: 2048, 32768: 1024, 4096: 512}[expected]
    assert placed.plan.max_num_seqs == 256


def test_choice_of_device() -> None:
    two = gpus((24, 10), (24, 20))
    assert place(two).plan.device == "cuda:1", "the one with the most free memory"
    assert place(two, options={"main_gpu": 0}).plan.device == "cuda:0"
    assert place(two, options={"num_gpu": 0}).plan.device == "cpu"
    assert place(two, device="cpu").plan.device == "cpu"
    assert place(two, device="cuda:0").plan.device == "cuda:0"
    assert place(two, options={"num_gpu": 10}).notes != ()
    assert place(two, options={"num_gpu": 33}).notes == ()
    full = gpus((24, 1.5))
    spilled = place(full)
    assert (spilled.plan.device, spilled.spilled) == ("cpu", True)
    assert "does not fit on a GPU" in spilled.notes[0]
    with pytest.raises(DoesNotFit, match="more GPU memory"):
        place(full, device="cuda")
    with pytest.raises(EngineError, match=r"cuda:3: there is no such GPU \(found: cuda:0 card 0, cuda:1 card 1\)"):
        place(two, device="cuda:3")
    with pytest.raises(EngineError, match=r"there is no such GPU \(found: none\)"):
        place(cpu(8), device="cuda")
    with pytest.raises(EngineError, match="must be cpu, cuda or"):
        place(cpu(8), device="tpu")


def test_what_does_not_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"\(5\.\d GiB with a context of 4096 tokens\) than is available \(5\.0 GiB\)"):
        place(cpu(5), weights=4.8)
    with pytest.raises(DoesNotFit, match="context of 131072"):
        place(cpu(16), options={"num_ctx": 131072})
    assert place(cpu(24), options={"num_ctx": 131072}).plan.num_blocks == 8192


def test_threads_batches_and_kernels() -> None:
    made = place(cpu(16), options={"num_thread": 3, "num_batch": 32}, kernels="reference").plan
    assert (made.num_threads, made.max_batch_tokens, made.max_num_seqs, made.kernels) == (3, 32, 32, "reference")
    assert place(cpu(32), options={"num_ctx": 8192, "num_batch": None}).plan.max_batch_tokens == 1024


def test_runner_options_of_merged_options() -> None:
    merged, _ = api_options.merge({"num_ctx": 2048}, {"num_ctx": 0, "num_thread": 2, "num_gpu": 0, "temperature": 1})
    assert RunnerOptions.of(merged) == RunnerOptions(num_ctx=4, num_thread=2, num_gpu=0)
    assert RunnerOptions.of(api_options.Options()) == RunnerOptions() == RunnerOptions.of({"num_gpu": -1, "num_thread": 0})


def test_weight_bytes() -> None:
    def info(name: str, shape: tuple[int, ...], nbytes: int) -> TensorInfo:
        return TensorInfo(name, GGMLType.Q4_0, shape, nbytes, 0, 0)

    embedding, output = info("token_embd.weight", (96, 64), 3456), info("output.weight", (96, 64), 3456)
    linear = info("blk.0.attn_q.weight", (64, 64), 2304)
    untied = {each.name: each for each in (embedding, output, linear)}
    tied = {each.name: each for each in (embedding, linear)}
    layer, dense = WeightBytes((2304,), 3456 + 3456), WeightBytes((4 * 4096,), 3456 + 4 * 6144)
    once = WeightBytes((2304,), 3456)  # kernels that pack hold a tied embedding once
    assert weight_bytes(tied, ("cpu", "cuda"), Settings()) == {"cpu": once, "cuda": once}
    assert weight_bytes(untied, ("cpu", "cuda"), Settings()) == {"cpu": layer, "cuda": layer}
    assert layer.total == 3456 + 3456 + 2304
    for tensors, packed in ((untied, layer), (tied, once)):  # a tied embedding is a matrix too
        assert weight_bytes(tensors, ("cuda",), Settings()) == {"cpu": dense, "cuda": packed}
        assert weight_bytes(tensors, (), Settings()) == {"cpu": dense, "cuda": dense}
        assert weight_bytes(tensors, ("cpu", "cuda"), Settings(kernels="reference")) == {"cpu": dense, "cuda": dense}


def test_types_in_another_form_are_counted_as_they_will_lie() -> None:
    """6 bits a weight on the CPU for IQ1_M, rows filled up to 16; 3 5/8 on a GPU. Vectors are float32."""
    matrix = TensorInfo("blk.0.attn_q.weight", GGMLType.IQ1_M, (100, 256), 100 * 56, 0, 0)
    vector = TensorInfo("blk.0.attn_norm.weight", GGMLType.F16, (256,), 512, 0, 0)
    found = weight_bytes({each.name: each for each in (matrix, vector)}, ("cpu", "cuda"), Settings())
    assert found["cpu"] == WeightBytes((112 * 256 * 6 // 8 + 1024,), 0)
    assert found["cuda"] == WeightBytes((100 * 256 * 29 // 64 + 1024,), 0)


def test_embeddings_in_another_form() -> None:
    """A GPU holds them in its form, once where they are the head too; the CPU reads rows from the file."""
    embedding = TensorInfo("token_embd.weight", GGMLType.IQ2_XXS, (64, 256), 64 * 66, 0, 0)
    head = TensorInfo("output.weight", GGMLType.IQ2_XXS, (64, 256), 64 * 66, 0, 0)
    on_gpu, on_cpu = 64 * 106, 64 * 256 * 5 // 8
    for tensors, here, there in (([embedding], on_cpu + 64 * 66, on_gpu), ([embedding, head], on_cpu + 64 * 66, 2 * on_gpu)):
        found = weight_bytes({each.name: each for each in tensors}, ("cpu", "cuda"), Settings())
        assert (found["cpu"].total, found["cuda"].total) == (here, there)


def test_the_device_decides_what_the_weights_take() -> None:
    devices = gpus((24, 10), free=40)
    options = RunnerOptions()
    on_gpu = plan(config(), sizes(30, 5), devices, Settings(), options)
    assert (on_gpu.plan.device, on_gpu.weight_bytes) == ("cuda:0", 5 * GIB)
    on_cpu = plan(config(), sizes(5, 30), gpus((2, 1.9), free=40), Settings(), options)
    assert (on_cpu.plan.device, on_cpu.weight_bytes, on_cpu.spilled) == ("cpu", 5 * GIB, True)


def windowed(layers: int = 18, window: int = 512) -> ModelConfig:
    """gemma3 270m: 15 of 18 layers see 512 tokens; 18 KiB of f16 KV per token."""
    keys = {
        "context_length": 32768, "embedding_length": 640, "block_count": layers, "feed_forward_length": 2048,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": window, "vocab_size": 262144,
    }  # fmt: skip
    return ModelConfig.from_gguf({"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in keys.items()}})


def test_windowed_layers_take_their_window() -> None:
    """Of 32,768 tokens three layers keep all, fifteen 512 and those of one step (1,024): 119 MiB where there were 576."""
    options = RunnerOptions(num_ctx=32768)
    placed = plan(windowed(), sizes(0, 0, 18), cpu(32), Settings(num_parallel=1), options)
    made = placed.plan
    assert [(group.window, len(group.layers)) for group in made.groups] == [(0, 3), *[(512, 3)] * 5]
    assert made.num_blocks == 2048 + 5 * ((511 + made.max_batch_tokens + 15) // 16 + 1)
    assert placed.kv_bytes == made.num_blocks * 16 * 3 * 2 * 256 * 2
    whole = plan(windowed(window=32768), sizes(0, 0, 18), cpu(32), Settings(num_parallel=1), options)
    assert whole.plan.groups == () and whole.kv_bytes == 32768 * 18 * 1024 and placed.kv_bytes < whole.kv_bytes / 3


def test_q8_0_takes_whole_blocks_of_32() -> None:
    keys = {
        "context_length": 4096, "embedding_length": 240, "block_count": 2, "feed_forward_length": 64,
        "attention.head_count": 3, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 99,
    }  # fmt: skip
    odd = ModelConfig.from_gguf({"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}})
    placed = plan(odd, sizes(0, 0, 2), cpu(9), Settings(kv_cache_type="q8_0"), RunnerOptions())
    assert placed.plan.kv_dtype == "f16"
    assert placed.notes == ("OLLAMA_KV_CACHE_TYPE=q8_0: heads of 80 are not whole blocks of 32: the KV cache is f16",)


def test_fp8_is_for_gpus_that_have_it() -> None:
    """By both of vLLM's names; elsewhere f16, which a note says. A model whose layers are partly on the CPU has one type."""

    def placed(name: str, capability: tuple[int, int], devices: Devices) -> Placement:
        cards = tuple(replace(gpu, name=name, capability=capability) for gpu in devices.gpus)
        return place(replace(devices, gpus=cards), kv_cache_type="fp8_e4m3")

    room, tight = gpus((24, 23)), gpus((8, 4))
    made = placed("L4", (8, 9), room)
    assert (made.plan.kv_dtype, made.notes) == ("fp8", ())
    assert made.plan.kv_dtype == place(room, kv_cache_type="FP8").plan.kv_dtype
    assert made.kv_bytes == made.plan.num_blocks * 16 * 65536
    why = "has no fp8, NVIDIA's GPUs from compute capability 8.9 on do: the KV cache is f16"
    for name, capability, devices, first in (
        ("A100", (8, 0), room, "cuda:0"),
        ("AMD gfx942", (9, 4), room, "cuda:0"),
        ("H100", (9, 0), tight, "cpu"),
        ("none", (0, 0), cpu(32), "cpu"),
    ):
        made = placed(name, capability, devices)
        assert made.plan.kv_dtype == "f16" and f"OLLAMA_KV_CACHE_TYPE=fp8_e4m3: {first} {why}" in made.notes, name
        assert made.kv_bytes == made.plan.num_blocks * 16 * 131072
    assert len(placed("H100", (9, 0), tight).plan.spans) == 2
    with pytest.raises(DoesNotFit) as fp8:
        place(cpu(5.5), kv_cache_type="fp8")
    with pytest.raises(DoesNotFit) as f16:
        place(cpu(5.5))
    assert str(fp8.value) == str(f16.value), "what it would take as it would be"


def test_precise_is_the_request_s_choice_before_the_environment_s() -> None:
    for setting, option, expected in ((False, None, False), (True, None, True), (True, False, False), (False, True, True)):
        made = place(cpu(32), options={"precise": option}, precise=setting).plan
        assert (made.precise, made.kv_dtype) == (expected, "f32" if expected else "f16")
