"""Checks of fused decoder layers against the same layers run op by op, for everything that a layer may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ollamapy import cpu_kernels, ops
from ollamapy.engine.batch import Batch
from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.layers.attention import Step
from ollamapy.layers.block import DecoderBlock
from ollamapy.layers.layer import declared_tensors
from ollamapy.layers.rope import RotaryTable, inverse_frequencies
from ollamapy.layers.spec import AttentionSpec, ExpertsSpec, FeedForwardSpec, LayerSpec, Rope
from ollamapy.quant.tensor import QuantTensor
from tests.models.paged import make_batch
from tests.ops.tensors import float32
from tests.quant.test_dequant import random_blocks

CPU = torch.device("cpu")
LENGTH, FEED, LAYERS = 64, 96, 3
PLAIN = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    key_length=16,
    value_length=16,
    scale=0.25,
    softcap=0.0,
    window=0,
    causal=True,
    rope=Rope(16, 10000.0),
    interleaved_rope=False,
    fused_qkv=False,
    qkv_bias=(False, False, False),
    output_bias=False,
    qk_norm=False,
    sinks=False,
    query_temperature=False,
)
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "pairs": {"interleaved_rope": True},
    "partial": {"rope": Rope(8, 500.0)},
    "partial-pairs": {"rope": Rope(10, 500.0), "interleaved_rope": True},
    "no-rope": {"rope": Rope(0, 1.0)},
    "fused": {"fused_qkv": True},
    "fused-bias": {"fused_qkv": True, "qkv_bias": (True, True, True), "output_bias": True},
    "bias": {"qkv_bias": (True, False, True), "output_bias": True},
    "qk-norm": {"qk_norm": True},
    "cap": {"softcap": 1.5},
    "window": {"window": 7},
    "sinks": {"sinks": True},
    "temperature": {"query_temperature": True},
    "both-sides": {"causal": False},
    "heads": {"num_heads": 5, "num_kv_heads": 1, "key_length": 32, "rope": Rope(32, 1e4)},
    "lengths": {"key_length": 36, "value_length": 44, "num_kv_heads": 4, "rope": Rope(36, 1e4), "qk_norm": True},
    "all": {
        **{"interleaved_rope": True, "qkv_bias": (True, True, True), "output_bias": True, "qk_norm": True, "softcap": 2.0},
        **{"window": 9, "sinks": True, "query_temperature": True, "key_length": 48, "value_length": 32, "rope": Rope(32, 1e4)},
    },
}


class Layers:
    """Decoder blocks with random weights, run either way over caches of their own."""

    def __init__(self, specs: list[LayerSpec], type: GGMLType | dict[str, GGMLType], precise: bool = False) -> None:
        """`type`: of the matrices, or of each by its name, the others being Q8_0."""
        generator = torch.Generator().manual_seed(0)
        ops.choose(CPU, precise=precise)
        self.blocks = [DecoderBlock(spec, i) for i, spec in enumerate(specs)]
        for block in self.blocks:
            for path, layer, key, declared in declared_tensors(block):
                values = torch.randn(declared.shape, generator=generator) / declared.shape[-1] ** 0.5
                own = type.get(path.split(".")[-2], GGMLType.Q8_0) if isinstance(type, dict) else type
                value = quantized(values, own) if declared.use == "linear" else float32(values + (key == "weight"))
                layer.load(key, ops.prepare(value, CPU, declared.use))
        ropes = list(dict.fromkeys(block.spec.attention.rope for block in self.blocks))
        interleaved = specs[0].attention.interleaved_rope
        self.rotary = {rope: RotaryTable(inverse_frequencies(rope), 1.1, interleaved, CPU) for rope in ropes}
        self.stack = ops.stack([block.fused(ropes.index(block.spec.attention.rope)) for block in self.blocks])
        assert self.stack is not None
        ops.choose(CPU)
        self.caches = [[ops.new_cache(block.state, 12, 16, torch.float32, CPU) for block in self.blocks] for _ in range(2)]

    def fused(self, x: Tensor, batch: Batch) -> Tensor:
        tables = [table.turns(max(batch.context_lens)) for table in self.rotary.values()]
        return self.stack(x.clone(), batch, self.caches[0], tables, temperature(batch))

    def apart(self, x: Tensor, batch: Batch) -> Tensor:
        length = max(batch.context_lens)
        turns = {rope: table.rows(batch.positions, length) for rope, table in self.rotary.items()}
        step = Step([batch], [batch.slot_mapping], turns, temperature(batch).view(-1, 1, 1))
        x = x.clone()
        for block, cache in zip(self.blocks, self.caches[1], strict=True):
            x = block(x, step, cache)
        return x


def temperature(batch: Batch) -> Tensor:
    return 1.0 + 0.1 * torch.log1p(batch.positions.float())


def quantized(values: Tensor, type: GGMLType) -> QuantTensor:
    """The values in a type that is easily made: F32, F16, Q2_0 or Q8_0. Of NVFP4 other values of their size."""
    if type is GGMLType.F32:
        return float32(values)
    if type is GGMLType.F16:
        return QuantTensor(values.half().view(torch.uint8), type, tuple(values.shape))
    if type is GGMLType.NVFP4:
        blocks = torch.from_numpy(random_blocks(type, values.numel() // 64))
        blocks[:, :4] = 0x10  # 2^-6, of halves up to 12
        return QuantTensor(blocks.view(*values.shape[:-1], -1), type, tuple(values.shape))
    if type is GGMLType.Q2_0:
        groups = values.view(-1, 64)
        scale = (groups.abs().amax(1, keepdim=True) / 2).half()
        codes = ((groups / scale.float()).round().clamp(-1, 2) + 1).to(torch.uint8).view(-1, 16, 4)
        blocks = torch.cat((scale.view(torch.uint8), (codes << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)), 1)
        return QuantTensor(blocks.view(*values.shape[:-1], -1), type, tuple(values.shape))
    groups = values.view(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 127).half()
    quants = (groups / scale.float()).round().to(torch.int8)
    blocks = torch.cat((scale.view(torch.uint8), quants.view(torch.uint8)), 1)
    assert blocks.shape[1] == TYPES[type].type_size
    return QuantTensor(blocks.view(*values.shape[:-1], -1), type, tuple(values.shape))


def spec_of(
    name: str, activation: str = "silu", post_norms: bool = False, fused_gate: bool = False, experts: ExpertsSpec | None = None
) -> LayerSpec:
    return LayerSpec(
        embedding_length=LENGTH,
        norm_eps=1e-5,
        post_norms=post_norms,
        attention=replace(PLAIN, **ATTENTION[name]),
        feed_forward=FeedForwardSpec(FEED, activation, fused_gate, experts),  # type: ignore[arg-type]
    )


def _same(fused: Tensor, apart: Tensor, bound: float, name: str) -> float:
    error = float(((fused - apart).norm(dim=1) / apart.norm(dim=1)).max()) / bound
    assert error <= 1.0, (name, error)
    return error


def _steps(layers: Layers, bound: float, name: str) -> float:
    """A prefill of unequal sequences, then a chunk beside decoding ones."""
    generator, worst = torch.Generator().manual_seed(1), 0.0
    tables = [[7, 2, 9], [4], [11, 0, 3]]
    for query, context in (([33, 1, 18], [33, 1, 18]), ([1, 1, 22], [34, 2, 40]), ([1], [35])):
        batch = make_batch(tables[: len(query)], query, context, 16)
        x = torch.randn(sum(query), LENGTH, generator=generator)
        worst = max(worst, _same(layers.fused(x, batch), layers.apart(x, batch), bound, name))
    return worst


def check_dense() -> float:
    """Float weights: both ways are float32 throughout. Some ten chains of at most 96 roundings a layer, each side."""
    bound = 2 * LAYERS * 10 * 8 * FEED**0.5 * 2.0**-24
    worst = 0.0
    for name in ATTENTION:
        layers = Layers([spec_of(name)] * LAYERS, GGMLType.F32)
        worst = max(worst, _steps(layers, bound, name))
    for activation in ("silu", "gelu_tanh"):
        for post_norms in (False, True):
            for fused_gate in (False, True):
                spec = spec_of("plain", activation, post_norms, fused_gate)
                worst = max(worst, _steps(Layers([spec] * LAYERS, GGMLType.F16), bound, str(spec)))
    mixed = [spec_of("window"), spec_of("plain"), spec_of("partial")]  # layers that differ, with two rotary tables
    return max(worst, _steps(Layers(mixed, GGMLType.F32), bound, "mixed"))


def check_quantized() -> float:
    """Where two float32 results straddle a tie, their int8 differ by a step, 1/127 of a group's largest, and what comes after
    differs in earnest; four times a layer, and independently."""
    bound = (4 * LAYERS) ** 0.5 / 127
    worst = 0.0
    for name in ("plain", "fused-bias", "all"):
        for post_norms, fused_gate in ((False, False), (True, True)):
            spec = spec_of(name, "gelu_tanh", post_norms, fused_gate)
            worst = max(worst, _steps(Layers([spec] * LAYERS, GGMLType.Q8_0), bound, name))
    few = {"attn_k": GGMLType.Q2_0, "attn_v": GGMLType.NVFP4, "ffn_up": GGMLType.Q2_0}  # beside Q8_0 on the same rows
    return max(worst, _steps(Layers([spec_of("plain")] * LAYERS, few), bound, "types of few values"))


EXPERTS = {
    "softmax": ExpertsSpec(8, 2, FEED, "softmax", 0.0, False),
    "one": ExpertsSpec(5, 1, FEED, "softmax", 1.7, False),
    "all": ExpertsSpec(3, 3, FEED, "sigmoid", 2.5, False),
    "selected": ExpertsSpec(33, 9, FEED, "softmax_selected", 0.0, False),
    "many": ExpertsSpec(70, 20, 32, "sigmoid", 0.0, False),
}


def check_experts() -> float:
    """Fused beside op by op: as for dense layers, with a chain more for the router and one for the weighted sum. A token whose
    experts are decided by a rounding would differ in earnest; none is here."""
    bound = 2 * LAYERS * 12 * 8 * FEED**0.5 * 2.0**-24
    worst = 0.0
    for name, experts in EXPERTS.items():
        dense, sparse = spec_of("plain"), spec_of("plain", "gelu_tanh", post_norms=name == "many", experts=experts)
        for type, limit in ((GGMLType.F32, bound), (GGMLType.F16, bound), (GGMLType.Q8_0, (4 * LAYERS) ** 0.5 / 127)):
            worst = max(worst, _steps(Layers([sparse, dense, sparse], type), limit, name))
        worst = max(worst, _steps(Layers([sparse] * 2, GGMLType.Q8_0, precise=True), 20 * bound, f"{name}, precise"))
    return worst


def check_bad_numbers_choose_experts() -> None:
    """NaN in a row chooses experts that exist, and harms no other row."""
    layers = Layers([spec_of("plain", experts=EXPERTS["softmax"])] * 2, GGMLType.Q8_0)
    x = torch.randn(20, LENGTH, generator=torch.Generator().manual_seed(3))
    batch = make_batch([[1], [2]], [12, 8], [12, 8], 16)
    whole = layers.fused(x, batch)
    marred = x.clone()
    marred[4], marred[5, 3] = torch.nan, torch.inf
    got = layers.fused(marred, batch)
    assert torch.equal(got[:4], whole[:4]) and torch.equal(got[12:], whole[12:]) and not got[4:6].isfinite().any()


def check_rows_are_alone() -> None:
    """Together, alone, in chunks, on any number of threads: the same bits."""
    cases: list[tuple[str, GGMLType, ExpertsSpec | None, bool]] = [
        ("plain", GGMLType.Q8_0, None, False),
        ("all", GGMLType.Q8_0, None, False),
        ("all", GGMLType.F16, None, False),
        ("plain", GGMLType.Q8_0, None, True),
        *(("plain", GGMLType.Q8_0, experts, precise) for experts in EXPERTS.values() for precise in (False, True)),
    ]
    for name, type, experts, precise in cases:
        layers = Layers([spec_of(name, post_norms=True, experts=experts)] * LAYERS, type, precise)
        x = torch.randn(52, LENGTH, generator=torch.Generator().manual_seed(2))
        tables = [[7, 2, 9], [4], [11, 0, 3]]
        whole = layers.fused(x, make_batch(tables, [33, 1, 18], [33, 1, 18], 16))
        for threads in (1, 3):
            cpu_kernels.kernels().set_threads(threads)
            assert torch.equal(layers.fused(x, make_batch(tables, [33, 1, 18], [33, 1, 18], 16)), whole)
        cpu_kernels.kernels().set_threads(2)
        assert torch.equal(layers.fused(x[34:], make_batch([tables[2]], [18], [18], 16)), whole[34:])
        assert torch.equal(layers.fused(x[33:34], make_batch([tables[1]], [1], [1], 16)), whole[33:34])
        for start, stop in ((0, 1), (1, 6), (6, 32), (32, 33)):
            batch = make_batch([tables[0]], [stop - start], [stop], 16)
            assert torch.equal(layers.fused(x[start:stop], batch), whole[start:stop])
        marred = x.clone()
        marred[33] = torch.nan
        got = layers.fused(marred, make_batch(tables, [33, 1, 18], [33, 1, 18], 16))
        assert torch.equal(got[:33], whole[:33]) and torch.equal(got[34:], whole[34:]) and got[33].isnan().all()


def check_chunks_shared_out() -> None:
    """A long context's keys are shared out among threads when there are fewer KV heads: the bits of one thread, in every layer,
    whatever heads the layers have."""
    for names, type in ((("plain", "window", "all"), GGMLType.Q8_0), (("heads", "plain", "all"), GGMLType.F32)):
        layers = Layers([spec_of(name) for name in names], type)
        x = torch.randn(700, LENGTH, generator=torch.Generator().manual_seed(5))
        found = []
        for threads in (1, 2, 3):
            cpu_kernels.kernels().set_threads(threads)
            layers.caches[0] = [ops.new_cache(block.state, 45, 16, torch.float16, CPU) for block in layers.blocks]
            steps = ((0, 600), (600, 601), (601, 604), (604, 700))
            table = list(range(44))
            parts = [layers.fused(x[start:stop], make_batch([table], [stop - start], [stop], 16)) for start, stop in steps]
            found.append(torch.cat(parts))
        cpu_kernels.kernels().set_threads(2)
        assert found[0].isfinite().all() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def check_misfits() -> None:
    """Layers that the fused kernel does not take are run op by op, not refused at load."""
    block = DecoderBlock(spec_of("plain"), 0)
    for _, layer, key, declared in declared_tensors(block):
        layer.load(key, ops.prepare(float32(torch.zeros(declared.shape)), CPU, declared.use))
    fits = block.fused(0)
    assert fits is not None and cpu_kernels.misfit(fits) == ""
    narrow = cpu_kernels.prepare_linear(float32(torch.zeros(40, LENGTH)), CPU)
    mixed = cpu_kernels.prepare_linear(quantized(torch.ones(32, LENGTH), GGMLType.Q8_0), CPU)
    for weights, reason in (({"up": narrow}, "up is 40 x 64"), ({"k": mixed}, "float and quantized weights among q, k, v")):
        odd = replace(fits, weights={**fits.weights, **weights})
        assert reason in cpu_kernels.misfit(odd) and ops.stack([fits, odd]) is None


def check_norm() -> None:
    """Rounding: n / 16 + 5 additions of squares, halved by the root, and six operations more. Rows are alone."""
    for shape in ((1, 1), (3, 7), (5, 4, 64), (2, 577), (200, 48), (0, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 3 + 1
        weight = torch.linspace(-2, 3, shape[-1])
        got, wide = cpu_kernels.rms_norm(x, weight, 1e-5), x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        assert torch.all((got - expected).abs() <= (shape[-1] / 32 + 9) * 2.0**-24 * expected.abs())
        for i in range(0, shape[0], 67):
            assert torch.equal(cpu_kernels.rms_norm(x[i : i + 1], weight, 1e-5), got[i : i + 1])


def checks() -> list[Any]:
    ops.choose(CPU)
    return [
        *(check_norm, check_dense, check_quantized, check_experts, check_bad_numbers_choose_experts),
        *(check_rows_are_alone, check_chunks_shared_out, check_misfits),
    ]
