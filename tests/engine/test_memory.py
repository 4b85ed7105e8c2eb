"""KV blocks on a device with so much memory and no more: measured, made fewer, refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.graphs import MAX_BYTES
from ollamapy.engine.memory import MARGIN
from ollamapy.engine.protocol import LayerGroup
from ollamapy.errors import EngineError
from tests.engine.device import Emulated
from tests.engine.fake import GROUPS, VOCAB, FakeModel, Run, alone

PROMPT = [5, 3, 8, 1, 9, 2, 7]
PLAN: dict[str, object] = {
    "block_size": 4,
    "context_length": 64,
    "max_batch_tokens": 100,
    "num_blocks": 100,
    "most_blocks": 400,
}
BLOCK = 2 * 2 * 2 * 4 * 4  # bytes: two layers, key and value of two float32 numbers, four tokens
LOGITS = 64 * VOCAB * 4  # bytes that recorded steps share: float32 rows of the widest step


class Small(FakeModel):
    """Has memory for so many blocks."""

    room: int = 1 << 30

    def new_caches(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, groups: Sequence[LayerGroup] = ()
    ) -> list[KVCache]:
        if num_blocks > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().new_caches(num_blocks, block_size, dtype, groups)


def free_for(blocks: int, peak: int, reserve: int = 0) -> int:
    """Bytes of a device that has room for so many blocks, and one of padding, beside a step's peak."""
    return (blocks + 1) * BLOCK + int(MARGIN * peak) + MAX_BYTES + LOGITS + reserve


@pytest.mark.parametrize(
    ("room", "blocks"),
    [(1000, 400), (400, 400), (399, 399), (130, 130), (50, 50), (16, 16), (3, 16)],  # more than 400 nobody asked for
)
def test_what_is_left_is_for_blocks(room: int, blocks: int) -> None:
    device = Emulated(free=free_for(room, peak=5000, reserve=700), peak=5000)
    run = Run(device=device, least_blocks=16, reserve_bytes=700, **PLAN)
    info = run.engine.info()
    assert info.num_blocks == run.engine.stats().total_blocks == blocks
    assert run.engine.runner.caches[0].key.shape[0] == blocks + 1, "one more, for padding"
    shown = (f"the GPU has room for {blocks} KV blocks of 4 tokens, not for 100",) if blocks < 100 else ()
    assert info.notes == shown
    assert run.one(PROMPT, max_tokens=20).tokens == alone(PROMPT, max_tokens=20).tokens


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_the_largest_steps_are_those_that_are_measured(groups: object) -> None:
    run = Run(device=Emulated(), groups=groups, **PLAN)
    assert run.model.batch_sizes == [(1, 64), (64, 64)], "a context; 100 tokens of one are not possible"
    more = Run(device=Emulated(), groups=groups, **{**PLAN, "max_batch_tokens": 200, "max_num_seqs": 9})
    assert more.model.batch_sizes == [(3, 192), (9, 9)]


def test_a_wide_step_that_decodes_may_take_the_most() -> None:
    """Attention over long contexts gives parts of a row's keys to programs of their own, which have sums of their own."""
    longest: list[int] = []

    class Scratch(FakeModel):
        def forward(self, batch: Batch, caches: Sequence[KVCache]) -> torch.Tensor:
            longest[:] = [len(batch.query_lens) * max(each.context_lens) for each in batch.groups]
            return super().forward(batch, caches)

    class Wide(Emulated):
        def peak_bytes(self, run: Callable[[], None]) -> list[int]:
            run()
            return [max(longest)]

    free = free_for(130, peak=64 * 96)
    run = Run(Scratch(), device=Wide(free=free), least_blocks=16, groups=GROUPS, **{**PLAN, "max_context": 96})
    assert run.engine.info().num_blocks == 261, "half the bytes: layers of two groups share them"


def test_fewer_blocks_where_memory_is_short_after_all() -> None:
    model = Small()
    model.room = 300
    device = Emulated()
    run = Run(model, device=device, least_blocks=16, **PLAN)
    assert run.engine.info().num_blocks == 291, "400, 360, 324, 291"
    assert device.num_released == 5
    assert run.one(PROMPT, max_tokens=20).tokens == alone(PROMPT, max_tokens=20).tokens


def test_not_even_one_context() -> None:
    model = Small()
    model.room = 20
    with pytest.raises(EngineError, match="no memory for a KV cache of 100 tokens"):
        Run(model, device=Emulated(), **{**PLAN, "least_blocks": 25, "max_batch_tokens": 16, "max_num_seqs": 4})


def test_recorded_steps_make_room_for_a_prompt() -> None:
    """Their memory cannot be used by others: a prompt that finds none has it back, and is run again."""

    class Tight(FakeModel):
        def forward(self, batch: Batch, caches: Sequence[KVCache]) -> torch.Tensor:
            if batch.num_tokens > 20 and device.reserved:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(batch, caches)

    device = Emulated()
    run = Run(Tight(), device=device)
    graphs = run.engine.execution.graphs
    assert graphs is not None
    run.add(0, PROMPT, max_tokens=60)
    while not graphs.keys:
        run.step()
    run.add(1, PROMPT * 4, max_tokens=20)
    run.drain()
    assert graphs.num_evicted == 1 and graphs.num_recorded > 1, "recorded again afterwards"
    assert run.answers[0].tokens == alone(PROMPT, max_tokens=60).tokens
    assert run.answers[1].tokens == alone(PROMPT * 4, max_tokens=20).tokens


def test_a_step_without_memory_fails_nobody_who_fits_alone() -> None:
    """Its sequences are run one by one, and only the one that does not fit alone ends."""

    class Tight(FakeModel):
        def forward(self, batch, caches):  # type: ignore[no-untyped-def]
            if batch.num_tokens > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(batch, caches)

    run = Run(Tight(), device=Emulated())
    for request in range(4):
        run.add(request, [*PROMPT, request], max_tokens=20)
    run.add(4, PROMPT * 2, max_tokens=20)
    run.drain()
    for request in range(4):
        assert run.answers[request].tokens == alone([*PROMPT, request], max_tokens=20).tokens
    finish = run.answers[4].finish
    assert finish is not None and finish.reason == "error" and "OutOfMemoryError" in finish.error
