"""Recorded steps on an emulated device: padded buffers give the answers of the ordinary path, whatever comes and goes."""

from __future__ import annotations

import logging

import pytest
import torch

from ollamapy.engine import graphs
from ollamapy.engine.graphs import seqs_bucket, width_bucket
from ollamapy.engine.schedule import Schedule
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
    assert found.num_recorded == device.num_recorded == len(found.keys)


def test_a_bucket_is_recorded_at_its_second_use() -> None:
    """So nothing is recorded that is not used, and every kernel has been compiled before it is recorded."""
    device = Emulated()
    run = recorded_run(device)
    run.add(0, PROMPT, max_tokens=30)
    run.step()  # the prompt
    run.step()
    assert not device.num_recorded
    run.step()
    assert graphs_of(run).keys == [(1, 16)] and 0 < graphs_of(run).nbytes - device.per_graph < 1 << 10, "and its buffers"
    for _ in range(5):
        run.step()
    assert device.num_recorded == 1 and graphs_of(run).num_replayed == 6
    run.add(1, PROMPT, max_tokens=30)
    for _ in range(4):
        run.step()
    assert graphs_of(run).keys == [(1, 16), (2, 16)]
    assert run.engine.stats().graphs == {
        **{"state": "on", "steps": "1 x 16, 2 x 16", "bytes": graphs_of(run).nbytes, "evicted": 0, "refused": 0},
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


def growing(device: Emulated) -> tuple[Run, graphs.Graphs]:
    """1, 2, 4 and 8 sequences, so that a bucket of each is used."""
    run = recorded_run(device)
    for request, length in enumerate((40, 30, 20, 20, 20)):
        run.add(request, [*PROMPT, request], max_tokens=length)
        for _ in range(4):
            run.step()
    found = graphs_of(run)
    for request, answer in run.drain().items():
        assert answer.tokens == alone([*PROMPT, request], max_tokens=(40, 30, 20, 20, 20)[request]).tokens
    return run, found


def test_the_one_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    _, found = growing(Emulated())
    assert found.num_evicted and len(found.keys) == 2 and found.keys[-1] == (1, 16)


def test_recorded_steps_that_take_too_much_are_made_anew() -> None:
    """What they share is given back when all of them are gone."""
    device = Emulated(per_graph=graphs.MAX_BYTES // 3)
    _, found = growing(device)
    assert found.num_evicted and found.nbytes <= graphs.MAX_BYTES
    assert found.num_recorded < device.num_recorded and found.nbytes - device.reserved < 1 << 16, "their buffers are small"


def test_a_step_that_takes_too_much_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    device = Emulated(per_graph=graphs.MAX_BYTES + 1)
    run, found = growing(device)
    assert not found.keys and not device.reserved and found.nbytes < 1 << 16
    assert device.num_recorded == 4, "each bucket once"
    told = [record.message for record in caplog.records if "no memory to record" in record.message]
    assert len(told) == 4 and "8 sequences and 16 blocks" in told[-1]
    assert run.engine.stats().graphs["refused"] == 4


def test_recorded_steps_share_their_logits() -> None:
    """Or each bucket would keep its own: 150 MB for 1 to 64 sequences of a vocabulary of 128 k."""
    run = recorded_run(Emulated())
    found, places = graphs_of(run), []
    computed = found.logits

    def watched(step: Schedule, feed: graphs.Feed | None = None) -> torch.Tensor | None:
        replayed = found.num_replayed
        logits = computed(step, feed)
        if logits is not None and found.num_replayed > replayed:
            places.append((logits.data_ptr(), len(step)))
        return logits

    found.logits = watched  # type: ignore[method-assign]
    for request in range(4):
        run.add(request, [*PROMPT, request], max_tokens=20)
        for _ in range(4):
            run.step()
    run.drain()
    assert len({count for _, count in places}) == 4 and len({place for place, _ in places}) == 1


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
    assert not device.num_recorded
    off = recorded_run(device, cuda_graphs=False)
    assert off.one(PROMPT, max_tokens=9).tokens == alone(PROMPT, max_tokens=9).tokens
    assert off.engine.stats().graphs == {"state": "off: OLLAMAPY_CUDA_GRAPHS=0"} and not device.num_recorded
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
