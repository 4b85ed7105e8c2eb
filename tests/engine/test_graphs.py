"""Recorded steps on an emulated device: padded buffers give the answers of the ordinary path, whatever comes and goes."""

from __future__ import annotations

import logging

import pytest
import torch

from ollamapy.engine import graphs
from ollamapy.engine.graphs import seqs_bucket, width_bucket
from tests.engine.device import Emulated
from tests.engine.fake import GROUPS, VOCAB, FakeModel, Run, alone

PROMPT = [5, 3, 8, 1, 9, 2, 7]
PLAN: dict[str, object] = {"block_size": 8, "num_blocks": 256, "context_length": 128, "max_num_seqs": 40, "overlap": False}


def recorded_run(device: Emulated, **plan: object) -> Run:
    return Run(device=device, **{**PLAN, **plan})


def graphs_of(run: Run) -> graphs.Graphs:
    found = run.engine.execution.graphs
    assert found is not None
    return found


def test_buckets() -> None:
    assert [seqs_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 64, 65, 81)] == [
        *(1, 2, 4, 4, 8, 8, 16, 16, 24, 24, 32, 64, 80, 96)
    ]
    assert [width_bucket(n, 16, 40_000) for n in (1, 64, 65, 256, 257, 2500)] == [64, 64, 256, 256, 1024, 2500]
    assert width_bucket(3, 8, 30) == 4, "no wider than the context"
    assert max(seqs_bucket(n) - n for n in range(1, 500)) < 16, "padding rows have a slot each in a block of 16"


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_same_answers_while_requests_come_and_go(groups: tuple[object, ...]) -> None:
    """Buckets grow and shrink; layers with a window have tables of their own."""
    device = Emulated()
    run = recorded_run(device, groups=groups)
    model_rows = []
    for request in range(20):
        run.add(request, [*PROMPT, request], max_tokens=7 + 3 * (request % 5), temperature=0.7 * (request % 2), seed=request)
        run.step()
        model_rows.append(run.model.batch_sizes[-1])
        if request == 11:
            run.engine.abort(9)
    run.drain()
    for request, answer in run.answers.items():
        want = alone([*PROMPT, request], max_tokens=7 + 3 * (request % 5), temperature=0.7 * (request % 2), seed=request)
        assert answer.tokens == want.tokens[: len(answer.tokens)]
        assert request == 9 or len(answer.tokens) == len(want.tokens)
    found = graphs_of(run)
    assert found.num_replayed > 5 and {seqs for seqs, _ in found.keys} <= {1, 2, 4, 8, 16, 24}
    assert found.num_recorded == len(device.recorded) == len(found.keys)


def test_a_bucket_is_recorded_at_its_second_use() -> None:
    """So nothing is recorded that is not used, and every kernel has been compiled before it is recorded."""
    device = Emulated()
    run = recorded_run(device)
    run.add(0, PROMPT, max_tokens=30)
    run.step()  # the prompt
    run.step()
    assert not device.recorded
    run.step()
    assert graphs_of(run).keys == [(1, 16)] and graphs_of(run).nbytes == device.per_graph
    for _ in range(5):
        run.step()
    assert len(device.recorded) == 1 and graphs_of(run).num_replayed == 6
    run.add(1, PROMPT, max_tokens=30)
    for _ in range(4):
        run.step()
    assert graphs_of(run).keys == [(1, 16), (2, 16)]
    assert run.engine.stats().graphs == {
        **{"state": "on", "steps": "1 x 16, 2 x 16", "bytes": 2 * device.per_graph, "evicted": 0},
        "replayed": graphs_of(run).num_replayed,
    }


def test_padding_changes_no_block_of_a_sequence() -> None:
    device = Emulated()
    run = recorded_run(device)
    key = run.engine.runner.caches[0].key
    assert key.shape[0] == 257 and run.engine.stats().total_blocks == 256, "the block of padding is in no pool"
    key[256] = 1.0
    for request in range(3):
        run.add(request, [*PROMPT, request], max_tokens=20)
    for _ in range(6):
        run.step()
    assert not key[256, 0].any() and key[256, 1:].all(), "one row was padding: token 0 at position 0"
    run.drain()


def test_the_one_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulated(per_graph=graphs.MAX_BYTES // 2)
    run = recorded_run(device)
    for request, length in enumerate((40, 30, 20, 20, 20)):
        run.add(request, [*PROMPT, request], max_tokens=length)
        for _ in range(4):
            run.step()
    found = graphs_of(run)
    assert found.num_evicted and found.nbytes <= graphs.MAX_BYTES and found.keys[-1] == (8, 16)
    for request, answer in run.drain().items():
        assert answer.tokens == alone([*PROMPT, request], max_tokens=(40, 30, 20, 20, 20)[request]).tokens


def test_a_device_that_cannot_record_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    run = recorded_run(Emulated(fails=True))
    with caplog.at_level(logging.ERROR):
        assert run.one(PROMPT, max_tokens=20).tokens == alone(PROMPT, max_tokens=20).tokens
    assert len([r for r in caplog.records if "not recorded any more" in r.message]) == 1
    assert "stream is capturing" in str(run.engine.stats().graphs["state"])


def test_what_is_not_recorded() -> None:
    """A prompt of one token more than is cached is a decoding step like others; embeddings and longer chunks are not."""
    device = Emulated()
    run = recorded_run(device)
    for request in range(3):
        run.add(request, [*PROMPT, 50 + request], max_tokens=1)
        run.drain()
    run.embed(3, [9])
    run.embed(4, [9])
    run.drain()
    run.embed(5, [9])
    run.drain()
    assert not device.recorded
    off = recorded_run(device, cuda_graphs=False)
    assert off.one(PROMPT, max_tokens=9).tokens == alone(PROMPT, max_tokens=9).tokens
    assert off.engine.stats().graphs == {"state": "off: OLLAMAPY_CUDA_GRAPHS=0"} and not device.recorded
    assert Run().engine.stats().graphs == {}


def test_a_request_that_fails_fails_alone() -> None:
    class Breaks(FakeModel):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            out = super().logits(hidden)
            if self.num_forwards == 6:
                out[1] = torch.nan
            assert out.shape[1] == VOCAB
            return out

    run = Run(Breaks(), device=Emulated(), **PLAN)
    run.add(0, PROMPT, max_tokens=20)
    run.add(1, [*PROMPT, 1], max_tokens=20)
    run.drain()
    ends = [answer.finish.reason for answer in run.answers.values() if answer.finish is not None]
    assert ends == ["length", "error"]
    assert run.answers[0].tokens == alone(PROMPT, max_tokens=20).tokens
