"""The C++ kernels for the CPU: every check under every instruction set, and what the ops refuse, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollamapy import _build, cpu_kernels, extension, ops
from ollamapy.gguf.types import GGMLType
from tests.ops import check_cpu_kernels, cpu_decoder
from tests.ops.cpu_linear import make_weight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def csrc() -> Any:
    loaded = extension.load()
    if loaded is None:
        pytest.skip(extension.status())
    return loaded


@pytest.fixture(params=list(_build.isas()))
def isa(request: pytest.FixtureRequest, csrc: Any) -> Iterator[str]:
    if request.param not in csrc.cpu_isas().split():
        pytest.skip(f"the kernels at hand have no {request.param} that runs here")
    before = extension.isa()
    csrc.cpu_isa(request.param)
    csrc.set_threads(2)
    ops.choose(CPU)
    yield request.param
    csrc.cpu_isa(before)


@pytest.mark.parametrize(
    "check", check_cpu_kernels.CHECKS, ids=lambda check: f"{check.__module__.split('.')[-1]}-{check.__name__}"
)
def test_kernels(check: Callable[[], Any], isa: str) -> None:
    check()


Q8 = int(GGMLType.Q8_0)
X = torch.zeros(2, 64)
IDS = torch.tensor([0])
ROWS = make_weight(GGMLType.Q8_0, 20, 2).data
IQ1 = make_weight(GGMLType.IQ1_S, 20, 1).data
BYTES = torch.zeros(65536, dtype=torch.uint8)


def _tiles(csrc: Any) -> Tensor:
    tiles: Tensor = csrc.pack_weight(ROWS, Q8, 64)
    return tiles


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda o, t: o.pack_weight(ROWS, 99, 64), "pack_weight: no kernel for tensor type 99"),
        (lambda o, t: o.pack_weight(ROWS, 28, 256), "pack_weight: no kernel for tensor type 28"),
        (lambda o, t: o.pack_weight(ROWS, Q8, 63), "pack_weight: rows of 63 weights are not whole blocks of 32"),
        (lambda o, t: o.pack_weight(ROWS, Q8, 0), "pack_weight: rows of 0 weights"),
        (lambda o, t: o.pack_weight(ROWS, Q8, -32), "pack_weight: rows of -32 weights"),
        (lambda o, t: o.pack_weight(ROWS, Q8, 96), "pack_weight: rows have 68 bytes, not 102"),
        (lambda o, t: o.pack_weight(ROWS.float(), Q8, 64), "pack_weight: rows has the wrong dtype"),
        (lambda o, t: o.pack_weight(ROWS[0], Q8, 64), "pack_weight: rows has 1 dimensions"),
        (lambda o, t: o.pack_weight(ROWS[:, ::2], Q8, 32), "pack_weight: rows is not contiguous"),
        (lambda o, t: o.pack_weight(ROWS, Q8, 64, IDS.byte()), "pack_weight: a table of another size than 0 bytes"),
        (lambda o, t: o.pack_weight(IQ1, 19, 256), "pack_weight: a table of another size than 32768 bytes"),
        (
            lambda o, t: o.pack_weight(IQ1, 19, 256, torch.zeros(32767, dtype=torch.uint8)),
            "pack_weight: a table of another size",
        ),
        (lambda o, t: o.pack_weight(IQ1, 19, 256, torch.zeros(32768)), "pack_weight: table has the wrong dtype"),
        (
            lambda o, t: o.pack_weight(IQ1, 19, 256, torch.zeros(65536, dtype=torch.uint8)[::2]),
            "pack_weight: table is not a contiguous",
        ),
        (lambda o, t: o.pack_weight(IQ1, 19, 288, None), "pack_weight: rows of 288 weights are not whole blocks of 256"),
        (lambda o, t: o.pack_weight(IQ1, 19, 512, None), "pack_weight: rows have 50 bytes, not 100"),
        (lambda o, t: o.unpack_weight(t, Q8, 40, 64), "unpack_weight: tiles have another shape"),
        (lambda o, t: o.unpack_weight(t, Q8, -1, 64), "unpack_weight: tiles have another shape"),
        (lambda o, t: o.unpack_weight(t, Q8, 20, 128), "unpack_weight: tiles have another shape"),
        (lambda o, t: o.linear(X.double(), t, Q8, 20, None), "linear: x has the wrong dtype"),
        (lambda o, t: o.linear(X[0], t, Q8, 20, None), "linear: x has 1 dimensions"),
        (lambda o, t: o.linear(torch.zeros(64, 2).T, t, Q8, 20, None), "linear: x and tiles must be contiguous"),
        (lambda o, t: o.linear(X[:, :32].contiguous(), t, Q8, 20, None), r"linear: tiles are not those of a \(20, 32\) weight"),
        (lambda o, t: o.linear(X, t, Q8, 33, None), r"linear: tiles are not those of a \(33, 64\) weight"),
        (lambda o, t: o.linear(X, t, Q8, 0, None), r"linear: tiles are not those of a \(0, 64\) weight"),
        (lambda o, t: o.linear(X, t, 2, 20, None), "linear: tiles are not those of"),
        (lambda o, t: o.linear(X, t.char(), Q8, 20, None), "linear: tiles has the wrong dtype"),
        (lambda o, t: o.linear(X, t, Q8, 20, torch.zeros(19)), r"linear: bias is not a contiguous \(20\)"),
        (lambda o, t: o.linear(X, t, Q8, 20, torch.zeros(20).double()), "linear: bias has the wrong dtype"),
        (lambda o, t: o.linear(X, t, Q8, 20, None, 0), "linear: 0 planes"),
        (lambda o, t: o.linear(X, t, Q8, 20, None, 4), "linear: 4 planes"),
        (lambda o, t: o.linear(X, t, 0, 20, None, 3), "linear: 3 planes"),
        (lambda o, t: o.embedding_tiles(t, 99, 20, 64, IDS), "embedding_tiles: no kernel for tensor type 99"),
        (lambda o, t: o.embedding_tiles(t, 16, 20, 64, IDS), "embedding_tiles: no kernel for tensor type 16"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 63, IDS), "embedding_tiles: rows of 63 weights are not whole blocks"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 0, IDS), "embedding_tiles: rows of 0 weights"),
        (lambda o, t: o.embedding_tiles(t, Q8, 33, 64, IDS), "embedding_tiles: tiles have another shape"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 128, IDS), "embedding_tiles: tiles have another shape"),
        (lambda o, t: o.embedding_tiles(t.float(), Q8, 20, 64, IDS), "embedding_tiles: tiles has the wrong dtype"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 64, IDS - 1), "embedding_tiles: id -1 is not a row of 20"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 64, IDS + 20), "embedding_tiles: id 20 is not a row of 20"),
        (lambda o, t: o.embedding_tiles(t, Q8, 20, 64, IDS.float()), "embedding_tiles: ids must be int32 or int64"),
        (lambda o, t: o.set_threads(0), "set_threads: 0 is not between 1 and 256"),
        (lambda o, t: o.set_threads(1000), "set_threads: 1000 is not between 1 and 256"),
    ],
)
def test_linear_refuses(csrc: Any, call: Callable[[Any, Tensor], Any], problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        call(csrc, _tiles(csrc))


def _mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


def test_weights_leave_memory_together(csrc: Any) -> None:
    """They share regions of 256 MB, which go with the last of them; a weight that is larger has a region of its own."""
    rows = torch.arange(2048 * 34 * 32, dtype=torch.int32).to(torch.uint8).view(2048, -1)  # 1024 weights each
    large = csrc.pack_weight(rows.expand(130, -1, -1).contiguous(), Q8, 1024)
    first, second = (csrc.pack_weight(rows + i, Q8, 1024) for i in range(2))  # a region that nothing else is in
    assert second.data_ptr() == first.data_ptr() + first.numel()
    assert large.numel() > 256 << 20 and torch.equal(large[129], first)
    addresses = [weight.data_ptr() for weight in (large, first, second)]
    del large
    assert [_mapped(address) for address in addresses] == [False, True, True]
    del first
    assert torch.equal(csrc.unpack_weight(second, Q8, 2048, 1024), rows + 1)
    assert [_mapped(address) for address in addresses] == [False, True, True]
    del second
    assert [_mapped(address) for address in addresses] == [False, False, False]


def test_no_rows(csrc: Any) -> None:
    assert csrc.linear(X[:0], _tiles(csrc), Q8, 20, None).shape == (0, 20)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda o: o.rms_norm(X.double(), X[0], 1e-6), "rms_norm: x has the wrong dtype"),
        (lambda o: o.rms_norm(X[0], X[0], 1e-6), "rms_norm: x has 1 dimensions"),
        (lambda o: o.rms_norm(X.T, X[:, 0], 1e-6), "rms_norm: x and weight must be contiguous"),
        (lambda o: o.rms_norm(X, X[0, :63], 1e-6), "rms_norm: weight has 63 elements, not 64"),
        (lambda o: o.rms_norm(X, X, 1e-6), "rms_norm: weight has 2 dimensions"),
    ],
)
def test_rms_norm_refuses(csrc: Any, call: Callable[[Any], Any], problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        call(csrc)


Q8_CACHE = torch.zeros(4, 1, 1, 544, dtype=torch.uint8)
ATTENTION: dict[str, Any] = {
    "q": torch.zeros(3, 32),
    "key": torch.zeros(4, 1, 16, 16),
    "value": torch.zeros(4, 1, 16, 16),
    "block_table": torch.tensor([[0, 1], [3, 0]], dtype=torch.int32),
    "query_start": torch.tensor([0, 2, 3], dtype=torch.int32),
    "seq_lens": torch.tensor([20, 1], dtype=torch.int32),
    "heads": 2,
    "scale": 1.0,
    "softcap": 0.0,
    "window": 0,
    "causal": True,
    "sinks": None,
}


def _ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"q": torch.zeros(3, 33)}, r"q is not \(tokens, 32\)"),
        ({"q": torch.zeros(3, 32).half()}, "q has the wrong dtype"),
        ({"q": torch.zeros(32, 3).T}, r"q is not \(tokens, 32\)"),
        ({"q": torch.zeros(4, 32)}, "query_start does not span 4 tokens"),
        ({"key": torch.zeros(4, 16, 16)}, "the cache has not four dimensions"),
        ({"key": torch.zeros(4, 1, 16, 32)}, "key cache is not that of 4 blocks, 1 heads of 16"),
        (
            {"key": torch.zeros(4, 1, 15, 16), "q": torch.zeros(3, 30)},
            "head lengths 15 and 16 are not between 16 and 256",
        ),
        ({"value": torch.zeros(4, 1, 16, 257)}, "head lengths 16 and 257 are not between 16 and 256"),
        ({"value": torch.zeros(3, 1, 16, 16)}, "value cache is not that of 4 blocks, 1 heads of 16"),
        ({"key": Q8_CACHE, "q": torch.zeros(3, 64)}, "value cache has the wrong dtype"),
        ({"key": Q8_CACHE, "value": Q8_CACHE}, r"q is not \(tokens, 64\)"),
        (
            {"key": Q8_CACHE, "value": Q8_CACHE[:3], "q": torch.zeros(3, 64)},
            "value cache is not that of 4 blocks, 1 heads of 32",
        ),
        ({"key": Q8_CACHE[..., :16], "value": Q8_CACHE, "q": torch.zeros(3, 64)}, "the cache is not contiguous"),
        (
            {"key": Q8_CACHE[..., :16].contiguous(), "value": Q8_CACHE, "q": torch.zeros(3, 64)},
            "key cache is not that of 4 blocks",
        ),
        ({"value": torch.zeros(4, 1, 16, 16).half()}, "value cache has the wrong dtype"),
        ({"key": torch.zeros(4, 1, 16, 16).double(), "value": torch.zeros(4, 1, 16, 16).double()}, "cache of another dtype"),
        ({"key": torch.zeros(4, 1, 16, 32)[..., ::2]}, "the cache is not contiguous"),
        ({"heads": 0}, "0 heads on 1 KV heads"),
        ({"heads": 3}, r"q is not \(tokens, 48\)"),
        ({"block_table": _ints([0, 4], [3, 0])}, "block 4 is not one of 4"),
        ({"block_table": _ints([0, -1], [3, 0])}, "block -1 is not one of 4"),
        ({"block_table": _ints([0, 1], [3, 0]).long()}, "block_table has the wrong dtype"),
        ({"block_table": _ints([0, 1, 0, 0], [3, 0, 0, 0])[:, ::2]}, "block_table is not contiguous"),
        ({"block_table": _ints([0], [3])}, "sequence 0 has 2 rows, 20 tokens and 1 blocks"),
        ({"query_start": _ints(0, 4, 3)}, "sequence 1 has -1 rows"),
        ({"query_start": _ints(1, 2, 3)}, "query_start does not span 3 tokens"),
        ({"query_start": _ints(0, 3)}, r"query_start is not a contiguous \(3\)"),
        ({"seq_lens": _ints(1, 1)}, "sequence 0 has 2 rows, 1 tokens"),
        ({"seq_lens": _ints(20, -1)}, "sequence 1 has 1 rows, -1 tokens"),
        ({"seq_lens": _ints(20, 2**31 - 1)}, "sequence 1 has 1 rows"),
        ({"seq_lens": _ints(20)}, r"seq_lens is not a contiguous \(2\)"),
        ({"window": -1}, "window -1 is negative"),
        ({"sinks": torch.zeros(3)}, r"sinks is not a contiguous \(2\)"),
    ],
)
def test_attention_refuses(csrc: Any, change: dict[str, Any], problem: str) -> None:
    assert csrc.attention(**ATTENTION).shape == (3, 32)
    with pytest.raises(RuntimeError, match=f"attention: {problem}"):
        csrc.attention(**{**ATTENTION, **change})


WRITE: dict[str, Any] = {
    "k": torch.zeros(3, 1, 16),
    "v": torch.zeros(3, 1, 16),
    "key": torch.zeros(4, 1, 16, 16),
    "value": torch.zeros(4, 1, 16, 16),
    "slots": torch.tensor([0, 63, 7]),
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"slots": torch.tensor([0, 64, 7])}, "slot 64 is not one of 64"),
        ({"slots": torch.tensor([0, -1, 7])}, "slot -1 is not one of 64"),
        ({"slots": torch.tensor([0, 1, 2, 3])}, r"k or v is not \(tokens, 16\) float32"),
        ({"slots": _ints(0, 1, 2)}, "slots has the wrong dtype"),
        ({"slots": torch.tensor([[0, 1, 2]])}, "slots has 2 dimensions"),
        ({"k": torch.zeros(3, 1, 8)}, r"k or v is not \(tokens, 16\) float32"),
        ({"v": torch.zeros(3, 1, 16).half()}, r"k or v is not \(tokens, 16\) float32"),
        ({"key": torch.zeros(4, 16, 16)}, "the cache has not four dimensions"),
        ({"key": torch.zeros(4, 2, 16, 16)}, "value cache is not"),
        ({"value": torch.zeros(4, 1, 8, 16)}, "value cache is not"),
    ],
)
def test_write_kv_refuses(csrc: Any, change: dict[str, Any], problem: str) -> None:
    csrc.write_kv(**WRITE)
    with pytest.raises(RuntimeError, match=f"write_kv: {problem}"):
        csrc.write_kv(**{**WRITE, **change})


LAYER: dict[str, Any] = {
    "tiles": [torch.zeros(n // 16, 16 * k * 4, dtype=torch.uint8) for n, k in ((32, 16), (16, 16), (16, 16), (16, 32))]
    + [torch.zeros(2, 1024, dtype=torch.uint8)] * 2
    + [torch.zeros(1, 2048, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)],
    "types": [0] * 8,
    "rows": [32, 16, 16, 16, 32, 32, 16, 0],
    "columns": [16, 16, 16, 32, 16, 16, 32, 0],
    "biases": [torch.zeros(0)] * 8,
    "vectors": [torch.ones(16), torch.zeros(0), torch.ones(16)] + [torch.zeros(0)] * 4,
    "facts": [2, 1, 16, 16, 0, 1, 16, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    "numbers": [1.0, 0.0, 1e-5, 1.0],
}
EXPERTS: dict[str, Any] = {  # three, of which a token uses two
    **LAYER,
    "tiles": LAYER["tiles"][:4]
    + [torch.zeros(3, 2, 1024, dtype=torch.uint8)] * 2
    + [torch.zeros(3, 1, 2048, dtype=torch.uint8), torch.zeros(1, 1024, dtype=torch.uint8)],
    "rows": [*LAYER["rows"][:7], 3],
    "columns": [*LAYER["columns"][:7], 16],
    "facts": [*LAYER["facts"][:11], 3, 2, 0, 1, 1],
}


def _with(name: str, index: int, value: Any, layer: dict[str, Any] = LAYER) -> dict[str, Any]:
    return {name: [value if i == index else old for i, old in enumerate(layer[name])]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"types": [0] * 7}, "lists of the wrong length"),
        ({"numbers": [1.0]}, "lists of the wrong length"),
        (_with("facts", 15, 0), "0 planes"),
        (_with("facts", 15, 4), "4 planes"),
        (_with("facts", 11, 3), "0 of 3 experts"),
        (_with("facts", 12, 1), "1 of 0 experts"),
        (_with("types", 2, 99), "no kernel for tensor type 99"),
        (_with("rows", 0, 40), r"weight of shape \(40, 16\)"),
        (_with("rows", 0, 48), "tiles of another shape"),
        (_with("columns", 0, 24), r"weight of shape \(32, 24\)"),
        (_with("tiles", 3, torch.zeros(0, dtype=torch.uint8)), "a weight is missing"),
        (_with("tiles", 1, torch.zeros(0, dtype=torch.uint8)), "attention weights do not fit"),
        (_with("tiles", 5, torch.zeros(0, dtype=torch.uint8)), "feed-forward weights do not fit"),
        (_with("biases", 0, torch.zeros(31)), r"bias is not a contiguous \(32\)"),
        (_with("vectors", 0, torch.zeros(0)), "a norm is missing"),
        (_with("vectors", 4, torch.zeros(15)), r"vector is not a contiguous \(16\)"),
        (_with("vectors", 6, torch.zeros(3)), r"vector is not a contiguous \(2\)"),
        (_with("facts", 0, 3), "attention weights do not fit"),
        (_with("facts", 1, 0), "2 heads on 0 KV heads"),
        (_with("facts", 2, 272), "head lengths 272 and 16"),
        (_with("facts", 4, -1), "window -1 is negative"),
        (_with("facts", 6, 18), "n_rot 18"),
        (_with("facts", 6, 7), "n_rot 7"),
        (_with("facts", 7, 3), "rope kind 3"),
        (_with("facts", 8, -1), "rope index -1"),
    ],
)
def test_layers_that_do_not_fit_are_refused(csrc: Any, change: dict[str, Any], problem: str) -> None:
    csrc.layer_free(csrc.layer_new(**LAYER))
    with pytest.raises(RuntimeError, match=f"layer_new: {problem}"):
        csrc.layer_new(**{**LAYER, **change})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_with("facts", 11, 2, EXPERTS), "tiles of another shape"),
        (_with("facts", 11, 5000, EXPERTS), "5000 experts"),
        (_with("facts", 11, -1, EXPERTS), "-1 experts"),
        (_with("facts", 12, 4, EXPERTS), "4 of 3 experts"),
        (_with("facts", 12, 0, EXPERTS), "0 of 3 experts"),
        (_with("facts", 13, 3, EXPERTS), "gating 3"),
        (_with("tiles", 4, LAYER["tiles"][4], EXPERTS), "tiles has 2 dimensions, not 3"),
        (_with("tiles", 5, torch.zeros(0, dtype=torch.uint8), EXPERTS), "feed-forward weights do not fit"),
        (_with("tiles", 7, torch.zeros(0, dtype=torch.uint8), EXPERTS), "experts and router come together"),
        (_with("rows", 7, 4, EXPERTS), "router and experts do not fit"),
        (_with("biases", 6, torch.zeros(16), EXPERTS), "experts have no bias"),
    ],
)
def test_experts_that_do_not_fit_are_refused(csrc: Any, change: dict[str, Any], problem: str) -> None:
    csrc.layer_free(csrc.layer_new(**EXPERTS))
    with pytest.raises(RuntimeError, match=f"layer_new: {problem}"):
        csrc.layer_new(**{**EXPERTS, **change})


DECODER: dict[str, Any] = {
    "hidden": torch.ones(3, 16),
    "positions": torch.tensor([18, 19, 0]),
    "slots": [torch.tensor([18, 19, 48])],
    "block_tables": [ATTENTION["block_table"]],
    **{key: ATTENTION[key] for key in ("query_start", "seq_lens")},
    "groups": [0],
    "keys": [ATTENTION["key"]],
    "values": [ATTENTION["value"]],
    "ropes": [torch.ones(20, 16)],
    "temperature": None,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layers": [10**9]}, "no layer 1000000000"),
        ({"layers": []}, "layers, caches and groups differ in number"),
        ({"keys": []}, "layers, caches and groups differ in number"),
        ({"hidden": torch.ones(3, 32)}, r"hidden is not a contiguous \(tokens, 16\)"),
        ({"hidden": torch.ones(3, 16).double()}, "hidden has the wrong dtype"),
        ({"hidden": torch.ones(16, 3).T}, r"hidden is not a contiguous \(tokens, 16\)"),
        ({"positions": torch.tensor([18, 20, 0])}, "position 20 beyond a rope table of 20"),
        ({"positions": torch.tensor([18, -1, 0])}, "position -1 beyond a rope table of 20"),
        ({"positions": torch.tensor([18, 19])}, r"positions is not a contiguous \(3\)"),
        ({"slots": [torch.tensor([18, 19, 64])]}, "slot 64 is not one of 64"),
        ({"slots": []}, "slots and block tables differ in number"),
        ({"block_tables": [_ints([0, 4], [3, 0])]}, "block 4 is not one of 4"),
        ({"block_tables": [_ints([0, 1])]}, r"query_start is not a contiguous \(2\)"),
        ({"groups": [1]}, "layer 0 is of group 1 of 1"),
        ({"groups": [-1]}, "layer 0 is of group -1 of 1"),
        ({"groups": []}, "layers, caches and groups differ in number"),
        ({"ropes": []}, "layer 0 has no rope table"),
        ({"ropes": [torch.ones(20, 8)]}, "layer 0 has no rope table"),
        ({"ropes": [torch.ones(20, 32)[:, ::2]]}, "a rope table is not contiguous"),
        ({"keys": [torch.zeros(4, 2, 16, 16)]}, "key cache is not that of 4 blocks, 1 heads of 16"),
        ({"keys": [Q8_CACHE], "values": [Q8_CACHE]}, "heads of 16 and 16 are not whole blocks of q8_0"),
        ({"values": [torch.zeros(4, 1, 16, 16).half()]}, "value cache has the wrong dtype"),
        ({"temperature": torch.ones(2)}, r"temperature is not a contiguous \(3\)"),
    ],
)
def test_decoder_refuses(csrc: Any, change: dict[str, Any], problem: str) -> None:
    layer = csrc.layer_new(**LAYER)
    arguments = {"layers": [layer], **DECODER}
    csrc.decoder(**arguments)
    with pytest.raises(RuntimeError, match=f"decoder: {problem}"):
        csrc.decoder(**{**arguments, **change})
    csrc.layer_free(layer)
    with pytest.raises(RuntimeError, match=f"decoder: no layer {layer}"):
        csrc.decoder(**arguments)
    warm = csrc.layer_new(**{**LAYER, **_with("facts", 10, 1)})
    with pytest.raises(RuntimeError, match="decoder: layer 0 wants a temperature"):
        csrc.decoder(**{**arguments, "layers": [warm]})
    csrc.layer_free(warm)


def test_layers_are_freed_with_their_stack(csrc: Any) -> None:
    ops.choose(CPU)
    layers = cpu_decoder.Layers([cpu_decoder.spec_of("plain")], GGMLType.F32)
    assert isinstance(layers.stack, cpu_kernels.Stack)
    (handle,) = layers.stack._layers
    del layers
    with pytest.raises(RuntimeError, match=f"no layer {handle}"):
        csrc.decoder(**{"layers": [handle], **DECODER})
