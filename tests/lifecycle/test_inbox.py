"""What waits for a reader: several outputs are taken as one, and nothing of them is lost."""

from __future__ import annotations

import asyncio

from ollamapy.engine.protocol import Finish, Output, TokenLogprob
from ollamapy.lifecycle.inbox import Inbox


def test_a_late_reader_gets_all_of_it() -> None:
    entries = [TokenLogprob(id, -1.0, []) for id in range(4)]
    finish = Finish("length", 5)

    async def taken() -> Output:
        inbox = Inbox()
        inbox.put(Output(3, [1], entries[:1], None, entries[1:3], queue_ns=7, cached_tokens=16, drafts=(2, 1)))
        inbox.put(Output(3, [2, 4], entries[3:], finish, num_shifts=3))
        return await inbox.take()

    assert asyncio.run(taken()) == Output(3, [1, 2, 4], [entries[0], entries[3]], finish, entries[1:3], 7, 16, (2, 1), 3)
