"""What an engine has said about one generation and its reader has not yet taken. Knows no engine and no socket."""

from __future__ import annotations

import asyncio

from ollamapy.engine.protocol import Output
from ollamapy.errors import OllamapyError


class Inbox:
    """Outputs that wait are kept as one; `behind` counts their tokens and logprob entries."""

    def __init__(self) -> None:
        self.behind = 0
        self.waits = True  # nothing has come yet
        self.error: OllamapyError | None = None
        self.news = asyncio.Event()
        self._pending: Output | None = None

    def put(self, output: Output) -> None:
        """`output` is the inbox's own from now on."""
        self._pending = output if self._pending is None else _joined(self._pending, output)
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
        output, self._pending, self.behind = self._pending, None, 0
        if self.error is not None:
            self.news.set()
        if output is None:
            assert self.error is not None
            raise self.error
        return output


def _joined(first: Output, then: Output) -> Output:
    """Takes the lists of `first` over: to copy them for each output would take time in the square of what waits."""
    first.token_ids.extend(then.token_ids)
    first.logprobs.extend(then.logprobs)
    first.prompt_logprobs.extend(then.prompt_logprobs)
    return Output(
        first.request_id,
        first.token_ids,
        first.logprobs,
        then.finish,
        first.prompt_logprobs,
        max(first.queue_ns, then.queue_ns),
        max(first.cached_tokens, then.cached_tokens),
        max(first.drafts, then.drafts),
        max(first.num_shifts, then.num_shifts),
    )
