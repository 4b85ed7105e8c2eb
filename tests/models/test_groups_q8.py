"""A q8_0 cache in layer groups, and on disk: neither changes a bit of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from ollamapy.engine import prefixes
from ollamapy.engine.engine import Engine
from ollamapy.engine.groups import layer_groups
from ollamapy.engine.prefix_store import PrefixStore
from ollamapy.engine.protocol import Output, Plan, SamplingParams, Step
from ollamapy.models.decoder import Decoder
from tests.models.test_parity import CASES
from tests.models.tiny import load_tiny, write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [(7 * i) % 500 + 3 for i in range(90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    tiny = CASES["gemma3-window"]
    _, path = write_tiny(tiny, tmp_path_factory.mktemp("gemma3"))
    return load_tiny(tiny, path, "csrc")


def engine_of(model: Decoder, store: PrefixStore | None = None, **plan: object) -> Engine:
    settings: dict[str, object] = {"kv_dtype": "q8_0", "num_blocks": 400, "context_length": 256, "max_batch_tokens": 24, **plan}
    return Engine(model, Plan("gemma3", **settings), store=store)  # type: ignore[arg-type]


def said(engine: Engine, count: int = 1) -> list[list[object]]:
    """What `count` equal requests are answered, one after the other."""
    answers: list[list[object]] = []
    for number in range(count):
        engine.add(number, PROMPT, SamplingParams(seed=1, max_tokens=30, logprobs=2))
        outputs: list[Output] = []
        while engine.has_work:
            outputs += [output for event in engine.step() if isinstance(event, Step) for output in event.outputs]
        assert engine.check_integrity() == "ok" and engine.stats().used_blocks == 0
        answers.append([(output.token_ids, output.logprobs) for output in outputs])
    return answers


def test_groups_and_files_change_no_bit_of_q8_0(model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes.Costs, "worth_reading", lambda *_: True)
    groups = layer_groups(model.config.windows, 256)
    assert len(groups) > 1
    alone = said(engine_of(model, prefix_cache=False))
    assert alone != said(engine_of(model, prefix_cache=False, kv_dtype="f32")), "q8_0 is what is tested"
    first = PrefixStore(tmp_path, 1 << 30, "q8_0")
    assert said(engine_of(model, first, groups=groups), 3) == 3 * alone
    assert first.flush(10) and first.num_written >= 5
    engine = engine_of(model, PrefixStore(tmp_path, 1 << 30, "q8_0"), groups=groups)
    assert said(engine) == alone
    assert engine.stats().disk_read_tokens >= 80 and engine.stats().disk_bad_files == 0
