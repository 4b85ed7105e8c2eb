"""Layer groups on a model with windows: no bit of an answer tells that blocks behind a window were given back."""

from __future__ import annotations

import pytest
import torch

from ollamapy.engine.engine import Engine
from ollamapy.engine.groups import layer_groups
from ollamapy.engine.protocol import Output, Plan, SamplingParams, Step
from ollamapy.models.decoder import Decoder
from tests.models.test_parity import CASES
from tests.models.tiny import load_tiny, write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
REQUESTS = 16


@pytest.fixture(scope="module", params=["csrc", "reference"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    tiny = CASES["gemma3-window"]
    _, path = write_tiny(tiny, tmp_path_factory.mktemp("gemma3"))
    return load_tiny(tiny, path, str(request.param))


def answers(model: Decoder, requests: list[tuple[list[int], SamplingParams]], **plan: object) -> list[list[Output]]:
    settings: dict[str, object] = {"kv_dtype": "f32", "block_size": 16, "context_length": 256, **plan}
    engine = Engine(model, Plan("gemma3", **settings))  # type: ignore[arg-type]
    outputs: list[list[Output]] = [[] for _ in requests]
    for index, (token_ids, params) in enumerate(requests):
        engine.add(index, token_ids, params)
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, Step)
            for output in event.outputs:
                outputs[output.request_id].append(output)
        assert engine.check_integrity() == "ok"
    assert engine.stats().used_blocks == 0
    if plan.get("groups"):
        assert engine.stats().prefix_hit_tokens > 0
        assert engine.stats().num_preemptions > 0 or plan["num_blocks"] != 50
    return outputs


def said(outputs: list[Output]) -> list[object]:
    return [(output.token_ids, output.logprobs) for output in outputs]


def test_groups_preemption_and_hits_change_no_bit(model: Decoder) -> None:
    head = [(7 * i) % 500 + 3 for i in range(90)]
    requests = [
        (
            head[: 20 + 10 * (i % 8)] + [i + 3] * (i % 4 + 1),
            SamplingParams(temperature=(i % 2) * 1.0, seed=i, max_tokens=30, logprobs=2),
        )
        for i in range(REQUESTS)
    ]
    alone = [answers(model, [request], num_blocks=64, prefix_cache=False)[0] for request in requests]
    groups = layer_groups(model.config.windows, 256)
    assert [(group.window, len(group.layers)) for group in groups] == [(0, 1), *[(16, 1)] * 6]
    for plan in ({"num_blocks": 50, "max_batch_tokens": 24}, {"num_blocks": 400, "max_batch_tokens": 64}):
        together = answers(model, requests, groups=groups, max_num_seqs=8, **plan)
        assert [said(outputs) for outputs in together] == [said(outputs) for outputs in alone], plan


def test_groups_take_the_memory_of_the_longest_group(model: Decoder) -> None:
    groups = layer_groups(model.config.windows, 256)
    whole = model.new_caches(10, 16, torch.float16)
    shared = model.new_caches(10, 16, torch.float16, groups)
    assert len({cache.key.data_ptr() for cache in whole}) == 7 and len({cache.key.data_ptr() for cache in shared}) == 1
    assert sorted(cache.group for cache in shared) == list(range(7))
