"""Models on more than one device: what goes where, by numbers alone."""

from __future__ import annotations

import pytest

from ollamapy.env import Settings
from ollamapy.lifecycle.fit import BASE_BYTES, Model, Place, Placement
from ollamapy.lifecycle.options import RunnerOptions
from ollamapy.lifecycle.placement import DoesNotFit
from tests.lifecycle.test_placement import GIB, config, cpu, gpus, place, sizes


def spans(placed: Placement) -> list[tuple[str, int]]:
    return [(span.device, span.num_layers) for span in placed.plan.spans]


def test_a_model_that_one_gpu_holds_is_not_split() -> None:
    placed = place(gpus((24, 23), (24, 20)), weights=10)
    assert (placed.plan.device, spans(placed), placed.notes) == ("cuda:0", [], ())


def test_layers_go_to_gpus_in_proportion_to_their_room() -> None:
    """24 GiB do not fit on either card; the emptier one is last, for it has the head as well."""
    placed = place(gpus((24, 16), (24, 20)), weights=24, options={"num_ctx": 4096})
    assert placed.plan.device == "cuda:1" and not placed.spilled
    (first, left), (second, right) = spans(placed)
    assert (first, second, left + right) == ("cuda:0", "cuda:1", 32)
    assert 12 <= left <= 16 and placed.notes == (
        f"layers are split (no GPU has room for all): {left} on cuda:0, {right} on cuda:1",
    )
    each = sizes(24, 24)["cuda"]
    kv = placed.kv_bytes // 32
    for layers, free, extra in ((left, 16, 0), (right, 20, each.rest)):
        assert layers * (each.layers[0] + kv) + extra + BASE_BYTES["cuda"] <= free * GIB


def test_spread_uses_all_gpus_though_one_would_do() -> None:
    placed = place(gpus((24, 20), (24, 20)), weights=8, sched_spread=True, options={"num_ctx": 4096})
    assert [device for device, _ in spans(placed)] == ["cuda:1", "cuda:0"]
    assert "OLLAMA_SCHED_SPREAD" in placed.notes[0]
    assert spans(place(gpus((24, 20)), weights=8, sched_spread=True)) == []


def test_what_the_gpus_have_no_room_for_goes_to_the_cpu() -> None:
    placed = place(gpus((12, 11.5), free=64), weights=20, options={"num_ctx": 4096})
    assert placed.plan.device == "cuda:0" and placed.spilled
    (first, on_cpu), (second, on_gpu) = spans(placed)
    assert (first, second, on_cpu + on_gpu) == ("cpu", "cuda:0", 32)
    assert placed.notes[0].startswith("layers are split (the GPUs have no room for more): ")
    one_more = place(gpus((12, 11.5), free=64), weights=20, options={"num_ctx": 4096, "num_gpu": on_gpu + 1})
    assert one_more.plan.device == "cpu", "it was the most that fits"
    assert placed.plan.groups == () and placed.plan.context_length == 4096


@pytest.mark.parametrize("count", [1, 10, 31])
def test_num_gpu_layers_go_to_the_gpu(count: int) -> None:
    placed = place(gpus((80, 79), free=64), weights=8, options={"num_gpu": count, "num_ctx": 4096})
    assert spans(placed) == [("cpu", 32 - count), ("cuda:0", count)] and not placed.spilled
    assert placed.notes == (f"layers are split (num_gpu): {32 - count} on cpu, {count} on cuda:0",)


def test_num_gpu_of_all_layers_splits_nothing() -> None:
    for count in (32, 33, 999):
        assert spans(place(gpus((80, 79)), weights=8, options={"num_gpu": count, "num_ctx": 4096})) == []


def test_a_forced_gpu_is_not_helped_by_the_cpu() -> None:
    with pytest.raises(DoesNotFit):
        place(gpus((12, 11.5), free=64), weights=20, device="cuda", options={"num_ctx": 4096})


def test_nothing_goes_to_a_gpu_that_has_not_room_for_the_head() -> None:
    placed = place(gpus((2, 1.9), free=64), weights=20, options={"num_ctx": 4096})
    assert (placed.plan.device, spans(placed), placed.spilled) == ("cpu", [], True)


def test_kv_room_is_that_of_the_fullest_device() -> None:
    roomy = place(gpus((80, 79), free=64), weights=8, options={"num_gpu": 16, "num_ctx": 4096})
    narrow = place(gpus((80, 79), free=7), weights=8, options={"num_gpu": 16, "num_ctx": 4096})
    assert narrow.plan.num_blocks < roomy.plan.num_blocks
    with pytest.raises(DoesNotFit):
        place(cpu(1), weights=8)


def test_shares_cover_all_layers_in_order() -> None:
    model = Model(config(), sizes(8, 8), Settings(), RunnerOptions(), "f16", False, "m.gguf", None)
    places = [Place("cuda:2", 9 * GIB), Place("cuda:0", 0), Place("cuda:1", 30 * GIB)]
    shared = model.shared_out(places, range(5, 32), 4096)
    assert [layer for _, layers in shared for layer in layers] == list(range(5, 32))
    assert [found.device for found, _ in shared] == ["cuda:2", "cuda:1"]
