"""The engine on devices that do their work late and in any order that streams allow (`late`): each answer is the one given
alone, nothing is read on the host while it is recorded, and nothing but tokens is waited for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.graphs import MAX_BYTES
from ollamapy.engine.memory import MARGIN
from ollamapy.engine.protocol import Caller, LayerGroup, LayerSpan
from tests.engine.fake import GROUPS, HIDDEN, VOCAB, FakeModel, Run, alone
from tests.engine.late import Handle, Late
from tests.engine.test_churn import TIERS, random_request

PROMPT = [5, 3, 8, 1, 9, 2, 7]


def held(batch: Batch) -> Batch:
    """The batch as a kernel sees it when it runs."""
    tensors = {name: getattr(batch, name) for name in Batch.__slots__}
    found = {name: value.memory for name, value in tensors.items() if isinstance(value, Handle)}
    return replace(batch, **found, others=[held(other) for other in batch.others])


class LateModel(FakeModel):
    """`FakeModel` as kernels of a late device; on two devices, its first layer is on the second."""

    late: Late

    def new_caches(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, groups: Sequence[LayerGroup] = ()
    ) -> list[KVCache]:
        made = super().new_caches(num_blocks, block_size, dtype, groups)
        moved: dict[int, Tensor] = {}
        for cache, device in zip(made, (self.late.devices[-1], self.late.devices[0]), strict=True):
            for tensor in cache.tensors():
                moved.setdefault(tensor.data_ptr(), tensor.to(device))
        return [KVCache(moved[cache.key.data_ptr()], moved[cache.value.data_ptr()], cache.group) for cache in made]

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        late, main = self.late, self.late.devices[0]
        memory = [KVCache(cache.key.memory, cache.value.memory, cache.group) for cache in caches]  # type: ignore[attr-defined]
        moved = None
        if len(late.devices) > 1:
            moved = self._first_layer(batch, memory[0])

        def run() -> Tensor:
            seen = held(batch)
            if moved is not None:
                wanted = torch.stack((seen.token_ids, seen.positions), 1).float()
                got = moved.memory.tolist()
                assert got == wanted.tolist(), "what came back from the other device is of another step"
                assert memory[0].key.view(-1, 2)[seen.slot_mapping].tolist() == wanted.tolist(), (
                    "the first layer was not there yet"
                )
            return FakeModel.forward(self, seen, memory)

        return late.launch("forward", (batch.logit_rows.shape[0], HIDDEN), torch.float32, main, run)

    def _first_layer(self, batch: Batch, cache: KVCache) -> Handle:
        late, (main, other) = self.late, self.late.devices
        shape = batch.num_tokens, 2
        tokens, places = batch.token_ids, batch.positions

        def embed() -> Tensor:
            return torch.stack((tokens.memory, places.memory), 1).float()  # type: ignore[attr-defined]

        x = batch.move(late.launch("embed", shape, torch.float32, main, embed), other)
        seen = batch.to(other)

        def write() -> Tensor:
            cache.key.view(-1, 2)[seen.slot_mapping.memory] = x.memory  # type: ignore[attr-defined]
            return x.memory  # type: ignore[attr-defined, no-any-return]

        found = batch.move(late.launch("first", shape, torch.float32, other, write), main)
        assert isinstance(found, Handle)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        def run() -> Tensor:
            return FakeModel.logits(self, hidden.memory)  # type: ignore[attr-defined]

        return self.late.launch("logits", (hidden.shape[0], VOCAB), torch.float32, self.late.devices[0], run)


@contextmanager
def running(
    seed: int, devices: int = 1, free: Sequence[int] = (), peaks: Sequence[int] = (), **plan: object
) -> Iterator[tuple[Late, Run]]:
    with Late(seed, devices) as late:
        late.free, late.peaks = list(free) or late.free, list(peaks) or late.peaks
        ops.choose(late.devices[0], "reference")
        try:
            model = LateModel()
            model.late = late
            spans = (LayerSpan("late:1", 1), LayerSpan("late:0", 1)) if devices > 1 else ()
            yield late, Run(model, device=late, spans=spans, **plan)
        finally:
            ops.choose(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("graphs", [False, True])
def test_one_request(graphs: bool, devices: int) -> None:
    with running(1, devices, cuda_graphs=graphs) as (_, run):
        answer = run.one(PROMPT, max_tokens=30, logprobs=2, suppress_ids=(3, 4), logit_bias=((7, 1.0),))
        overlap, found = run.engine.overlap, run.engine.execution.graphs
        assert overlap is not None and overlap.num_ahead >= 27
        if graphs:
            assert found is not None and not found.off and found.num_replayed == 28
    want = alone(PROMPT, max_tokens=30, logprobs=2, suppress_ids=(3, 4), logit_bias=((7, 1.0),))
    assert answer.tokens == want.tokens
    assert [[token for token, _ in each.top] for each in answer.logprobs] == [
        [t for t, _ in each.top] for each in want.logprobs
    ]


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_but_tokens_is_waited_for(devices: int) -> None:
    """A copy from the host that is not begun aside ("non_blocking", from pinned memory) stops the host until the step before is
    done. One request less makes rows change their places."""
    with running(2, devices) as (late, run):
        for request in range(5):
            few = {"suppress_ids": (3, request)} if request % 2 else {"logit_bias": ((7, 1.0 + request),), "logprobs": request}
            run.add(request, [*PROMPT, request], max_tokens=40, temperature=request % 3 / 2, top_k=(0, 5)[request % 2], **few)
        run.add(5, PROMPT, max_tokens=20)
        for _ in range(12):
            run.step()
        overlap, waits = run.engine.overlap, late.num_waits
        assert overlap is not None
        ahead = overlap.num_ahead
        for _ in range(12):
            run.step()
        assert overlap.num_ahead == ahead + 12 and late.num_waits == waits
        assert run.answers[5].finish is not None


def test_a_prompt_is_not_waited_for() -> None:
    """Its tokens and tables, and penalties, go to the device from pinned memory."""
    with running(3) as (late, run):
        run.add(0, PROMPT, max_tokens=40, repeat_penalty=1.2, presence_penalty=0.5)
        for _ in range(4):
            run.step()
        waits = late.num_waits
        run.add(1, [*PROMPT, 4], max_tokens=40, repeat_penalty=1.1)
        for _ in range(4):
            run.step()
        assert late.num_waits == waits and len(run.answers[1].tokens) >= 3


@pytest.mark.parametrize(
    ("seed", "devices"), [(1, 1), (0, 2), *(pytest.param(n, 1 + n % 2, marks=pytest.mark.slow) for n in range(2, 12))]
)
def test_churn(seed: int, devices: int) -> None:
    """Twelve at a time under memory pressure, with aborts, prefixes and shifts, while every step may be late."""
    rng = random.Random(seed)
    heads = [[rng.randrange(90) for _ in range(32)] for _ in range(3)]
    groups = GROUPS if seed == 1 and devices == 1 else ()
    settings = {"block_size": 8, "num_blocks": rng.choice([30, 60]), "context_length": 64, "max_batch_tokens": 64}
    requests = {i: random_request(rng, heads) for i in range(16 if seed < 2 else 60)}
    for i, (prompt, params) in requests.items():
        plain = {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "typical_p": 1.0} if i % 4 else {}
        requests[i] = prompt, {**params, **plain}
    aborted: set[int] = set()
    with running(seed, devices, max_num_seqs=12, groups=groups, **settings) as (_, run):
        waiting = list(requests)
        while waiting or run.engine.has_work:
            for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 4])):
                if waiting:
                    request = waiting.pop()
                    run.add(request, requests[request][0], Caller(rng.choice("abc"), rng.choice(TIERS)), **requests[request][1])
            if rng.random() < 0.04 and run.answers:
                victim = rng.choice(list(run.answers))
                if run.answers[victim].finish is None:
                    aborted.add(victim)
                run.engine.abort(victim)
            run.step()
        run.drain()
        overlap, found = run.engine.overlap, run.engine.execution.graphs
        assert overlap is not None and overlap.num_ahead > 5
        assert found is not None and not found.off and found.num_replayed > 5
    for request, (prompt, params) in requests.items():
        got, want = run.answers[request], alone(prompt, plan={"context_length": 64, "block_size": 8}, **params)
        assert got.finish is not None and want.finish is not None
        if request in aborted:
            assert got.tokens == want.tokens[: len(got.tokens)]
        else:
            assert got.tokens == want.tokens and got.finish.reason == want.finish.reason


@pytest.mark.parametrize(("blocks", "least"), [((300, 99), 99), ((99, 300), 99), ((5, 300), 16), ((900, 900), 400)])
def test_the_device_with_the_least_room_decides(blocks: tuple[int, int], least: int) -> None:
    """A layer on each of two devices, whose steps take different memory."""
    peaks, half = (5000, 9000), 2 * 2 * 4 * 4  # bytes of a block: key and value of two float32 numbers, four tokens
    recorded = MAX_BYTES + 64 * VOCAB * 4, MAX_BYTES  # the first device has the logits
    free = [
        (count + 1) * half + int(MARGIN * peak) + kept + 700 for count, peak, kept in zip(blocks, peaks, recorded, strict=True)
    ]
    settings = {"context_length": 64, "max_batch_tokens": 100, "num_blocks": 100, "least_blocks": 16, "most_blocks": 400}
    with running(1, 2, free, peaks, reserve_bytes=700, **settings) as (_, run):
        assert run.engine.info().num_blocks == least
