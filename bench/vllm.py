"""vLLM as a second peer, over HTTP: any server with OpenAI's completions that takes token ids and `ignore_eos` will do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import httpx

from bench.figures import BATCH_DECODE, BATCH_PROMPT, DECODE, PREFILL, PROMPT, Samples, Work, batch_column
from bench.llama_cpp import PeerError

NAME = "vLLM bf16"
ORDINARY = range(1000, 30000)  # token ids that are ordinary text in every vocabulary we measure


def measure(url: str, work: Work) -> Samples:
    """Tokens/s of each column. Decode is the time of a long answer less that of a one-token answer to prompts as long."""
    try:
        return asyncio.run(_measure(url, work))
    except httpx.HTTPError as problem:
        raise PeerError(f"{url}: {problem or type(problem).__name__}") from None


async def _measure(url: str, work: Work) -> Samples:
    samples: Samples = {}
    users = max(work.batches, default=1)
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=users), trust_env=False) as client:
        server = Server(client, url, (await client.get(f"{url}/v1/models")).json()["data"][0]["id"])
        await server.answer([[1000] * 8], 2)
        for _ in range(work.repeats):
            if work.prefill:
                samples.setdefault(PREFILL, []).append(PROMPT / await server.answer(prompts(1, PROMPT), 1))
            if work.single:
                samples.setdefault(work.single_column, []).append(await server.decode(1, 8, DECODE))
            for size in work.batches:
                samples.setdefault(batch_column(size), []).append(await server.decode(size, BATCH_PROMPT, BATCH_DECODE))
    return samples


class Server:
    def __init__(self, client: httpx.AsyncClient, url: str, model: str) -> None:
        self.client, self.url, self.model = client, url, model

    async def answer(self, asked: Sequence[list[int]], tokens: int) -> float:
        """Seconds until all of these prompts, sent at once, have answers of `tokens` tokens."""
        start = time.perf_counter()
        await asyncio.gather(*(self._one(ids, tokens) for ids in asked))
        return time.perf_counter() - start

    async def decode(self, users: int, length: int, tokens: int) -> float:
        short = await self.answer(prompts(users, length), 1)
        long = await self.answer(prompts(users, length), tokens + 1)
        return users * tokens / (long - short)

    async def _one(self, ids: list[int], tokens: int) -> None:
        request = {"model": self.model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        response = await self.client.post(f"{self.url}/v1/completions", json=request)
        response.raise_for_status()


def prompts(count: int, length: int) -> list[list[int]]:
    """Random, so that no prompt is found in a cache."""
    return [random.choices(ORDINARY, k=length) for _ in range(count)]
