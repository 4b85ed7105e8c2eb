"""What waits for a reader: several outputs are taken as one, and nothing of them is lost."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from ollamapy.engine.protocol import Finish, Output, Step, TokenLogprob
from ollamapy.lifecycle.inbox import Inbox
from ollamapy.lifecycle.process import MAX_BEHIND
from ollamapy.lifecycle.wire import encode, events


def test_a_late_reader_gets_all_of_it() -> None:
    entries = [TokenLogprob(id, -1.0, []) for id in range(4)]
    finish = Finish("length", 5)

    async def taken() -> Output:
        inbox = Inbox()
        inbox.put(Output(3, [1], entries[:1], None, entries[1:3], queue_ns=7, cached_tokens=16, drafts=(2, 1)))
        inbox.put(Output(3, [2, 4], entries[3:], finish, num_shifts=3))
        return await inbox.take()

    assert asyncio.run(taken()) == Output(3, [1, 2, 4], [entries[0], entries[3]], finish, entries[1:3], 7, 16, (2, 1), 3)


@pytest.mark.parametrize(("top", "most"), [(None, 1 << 20), (0, 2 << 20), (20, 3 << 20)])
def test_what_waits_takes_little_memory(top: int | None, most: int) -> None:
    """An eighth of what may wait: an eighth of what process.MAX_BEHIND says, and some for lists with room to grow."""
    frames = events()
    tracemalloc.start()
    try:
        inbox = Inbox()
        while inbox.behind < MAX_BEHIND // 8:
            number = 1000 + inbox.behind
            entries = (
                [] if top is None else [TokenLogprob(number, -float(number), [(number + n, -1.5 * n) for n in range(top)])]
            )
            ((step,)) = frames.feed(encode(Step([Output(3, [number], entries)])))
            assert isinstance(step, Step)
            inbox.put(step.outputs[0])
        assert tracemalloc.get_traced_memory()[0] < most
    finally:
        tracemalloc.stop()
