"""What an engine has said about one generation and its reader has not yet taken. Knows no engine and no socket."""

from __future__ import annotations

import asyncio

from ollamapy.engine.protocol import Output
from ollamapy.errors import OllamapyError


class Inbox:
    """Outputs that wait are taken as one; `behind` counts their tokens and logprob entries."""

    def __init__(self) -> None:
        self.pending: list[Output] = []
        self.behind = 0
        self.waits = True  # nothing has come yet
        self.error: OllamapyError | None = None
        self.news = asyncio.Event()

    def put(self, output: Output) -> None:
        self.pending.append(output)
        self.waits = False
        self.behind += len(output.token_ids) + sum(
            1 + len(entry.top) for entries in (output.logprobs, output.prompt_logprobs) for entry in entries
        )
        self.news.set()

    def fail(self, error: OllamapyError) -> None:
        self.error = error
        self.news.set()

    async def take(self) -> Output:
        """Everything that waits, as one Output. Raises the error once what came before it has been taken."""
        await self.news.wait()
        self.news.clear()
        outputs, self.pending, self.behind = self.pending, [], 0
        if self.error is not None:
            self.news.set()
        if not outputs:
            assert self.error is not None
            raise self.error
        if len(outputs) == 1:
            return outputs[0]
        return Output(
            outputs[0].request_id,
            [token for output in outputs for token in output.token_ids],
            [entry for output in outputs for entry in output.logprobs],
            outputs[-1].finish,
            [entry for output in outputs for entry in output.prompt_logprobs],
            max(output.queue_ns for output in outputs),
            max(output.cached_tokens for output in outputs),
            max(output.drafts for output in outputs),
            max(output.num_shifts for output in outputs),
        )
