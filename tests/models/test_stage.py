"""A model whose layers are split over devices. A CPU by another name stands in for the second one: everything that would move
to a GPU and back is moved, and the bits must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import LayerGroup, LayerSpan, Plan, SamplingParams, Step
from ollamapy.gguf.reader import GGUFFile
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from tests import real_models

OTHER = "cpu:0"  # not equal to "cpu" for torch.device, the same memory
SPLITS = [
    (LayerSpan("cpu", 11), LayerSpan(OTHER, 19)),
    (LayerSpan(OTHER, 1), LayerSpan("cpu", 28), LayerSpan(OTHER, 1)),
    (LayerSpan(OTHER, 30), LayerSpan("cpu", 0)),
]


def load(*spans: LayerSpan, kernels: str = "") -> Decoder:
    with GGUFFile.open(real_models.fetch("smollm2")) as file:
        return load_model(file, torch.device("cpu"), context_length=256, kernels=kernels, spans=spans)


def answers(model: Decoder, spans: tuple[LayerSpan, ...] = ()) -> dict[int, list[int]]:
    """Tokens of four requests of unequal lengths, prefilled in chunks."""
    engine = Engine(model, Plan("m.gguf", num_blocks=64, context_length=256, max_batch_tokens=32, spans=spans))
    for request, length in enumerate((3, 40, 17, 1)):
        params = SamplingParams(temperature=0.0 if request % 2 else 0.8, seed=request, max_tokens=12)
        engine.add(request, [1000 + 7 * place for place in range(length)], params)
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, Step)
            for output in event.outputs:
                found.setdefault(output.request_id, []).extend(output.token_ids)
                assert output.finish is None or not output.finish.error
    return found


@pytest.fixture(scope="module")
def whole() -> dict[int, list[int]]:
    return answers(load())


@pytest.mark.parametrize("spans", SPLITS)
def test_a_split_model_says_the_same(whole: dict[int, list[int]], spans: tuple[LayerSpan, ...]) -> None:
    model = load(*spans)
    devices = [torch.device(span.device) for span in spans for _ in range(span.num_layers)]
    assert [model.device_of(layer) for layer in range(30)] == devices
    assert answers(model, spans) == whole


def test_hidden_states_move_before_the_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded on a device has to be ended there, while it is still the one whose turn it is."""
    model, told = load(*SPLITS[1]), list[str]()
    forward, switch = model.forward, ops.switch

    def move(x: Tensor, device: torch.device) -> Tensor:
        told.append(f"move {device}")
        return x.to(device)

    def switched(device: torch.device) -> None:
        told.append(f"switch {device}")
        switch(device)

    monkeypatch.setattr(model, "forward", lambda batch, caches: forward(replace(batch, move=move), caches))
    engine = Engine(model, Plan("m.gguf", num_blocks=4, context_length=64, spans=SPLITS[1]))
    monkeypatch.setattr(ops, "switch", switched)
    engine.add(1, [7, 8, 9], SamplingParams(temperature=0.0, max_tokens=1))
    while engine.has_work:
        engine.step()
    assert told == [f"{what} {where}" for where in (OTHER, "cpu", OTHER, "cpu") for what in ("move", "switch")]


def test_bytes_are_counted_by_device() -> None:
    model = load(*SPLITS[0])
    assert model.vram_bytes == 0 and model.weight_bytes == load().weight_bytes


def test_layers_that_share_their_caches_are_not_split() -> None:
    model = load(*SPLITS[0])
    with pytest.raises(AssertionError):
        model.new_caches(4, 16, torch.float16, [LayerGroup(0, tuple(range(15))), LayerGroup(64, tuple(range(15, 30)))])


def test_spans_of_another_model_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="not of this model"):
        load(LayerSpan("cpu", 29))


def test_kernels_are_those_of_the_device_whose_turn_it_is() -> None:
    """A GPU's kernels and a CPU's are in force side by side: choosing for one leaves the other's choice alone."""
    load()
    before = ops.chosen()
    ops.choose(torch.device("meta"), "reference")
    assert set(ops.chosen().values()) == {"reference"}
    ops.switch(torch.device("cpu"))
    assert ops.chosen() == before
