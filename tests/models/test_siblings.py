"""Requests with one prompt on a model with windowed layers: whatever the cache's type, each has the bits that it has alone."""

from __future__ import annotations

import pytest

from ollamapy.engine.engine import Engine
from ollamapy.engine.groups import layer_groups
from ollamapy.engine.protocol import Output, Plan, SamplingParams, Step
from ollamapy.models.decoder import Decoder
from tests.models.test_parity import CASES
from tests.models.tiny import load_tiny, write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [(7 * i) % 500 + 3 for i in range(87)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    tiny = CASES["gemma3-window"]
    _, path = write_tiny(tiny, tmp_path_factory.mktemp("gemma3"))
    return load_tiny(tiny, path, "csrc")


def answers(model: Decoder, seeds: list[int], **plan: object) -> list[list[object]]:
    settings: dict[str, object] = {"num_blocks": 400, "context_length": 256, "max_batch_tokens": 24, **plan}
    engine = Engine(model, Plan("gemma3", **settings))  # type: ignore[arg-type]
    for number, seed in enumerate(seeds):
        engine.add(number, PROMPT, SamplingParams(seed=seed, temperature=1.0, max_tokens=24, logprobs=2))
    found: list[list[object]] = [[] for _ in seeds]
    while engine.has_work:
        outputs: list[Output] = [each for event in engine.step() if isinstance(event, Step) for each in event.outputs]
        for output in outputs:
            found[output.request_id].append((output.token_ids, output.logprobs))
    assert engine.check_integrity() == "ok" and engine.stats().used_blocks == 0
    if len(seeds) > 1 and engine.plan.prefix_cache:
        assert engine.stats().prefix_hit_tokens == (len(seeds) - 1) * (len(PROMPT) - 1)
    return found


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "q8_0"])
def test_choices_have_the_bits_that_they_have_alone(model: Decoder, kv_dtype: str) -> None:
    groups = layer_groups(model.config.windows, 256)
    assert len(groups) > 1
    together = answers(model, [1, 2, 3, 4, 5], kv_dtype=kv_dtype, groups=groups)
    assert answers(model, [1, 2, 3, 4, 5], kv_dtype=kv_dtype) == together
    alone = [answers(model, [seed], kv_dtype=kv_dtype, prefix_cache=False)[0] for seed in (1, 2, 5)]
    assert [together[0], together[1], together[4]] == alone
