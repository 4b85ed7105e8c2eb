"""A load generator: streaming chats over HTTP against one server, and what they saw. Knows no workload and starts no server.

Closed loop: so many users, each sends its next chat when the last is answered. Open loop: chats arrive at a rate, whether
or not those before are done. Every chat has a connection of its own (llama-server closes those that were used).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from bench.workloads import Chat


@dataclass(frozen=True, slots=True)
class Target:
    """`api`: ollama (/api/chat) or openai (/v1/chat/completions)."""

    url: str
    model: str
    api: str = "openai"


@dataclass(slots=True)
class Stream:
    """One chat: when it was sent and when each piece of its answer came, in seconds. `error`: why there was none."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0  # as the server counts them; where it does not, pieces
    prompt_tokens: int = 0  # as the server counts them
    wanted: int = 0  # tokens that the answer was to have
    error: str = ""


def body(target: Target, chat: Chat) -> tuple[str, dict[str, Any]]:
    """Path and JSON of a streaming chat, temperature 0."""
    request = {"model": target.model, "messages": chat.messages, "stream": True}
    if target.api == "ollama":
        return "/api/chat", {**request, "options": {"temperature": 0, "num_predict": chat.tokens}}
    usage = {"stream_options": {"include_usage": True}}
    return "/v1/chat/completions", {**request, **usage, "temperature": 0, "max_tokens": chat.tokens}


def read_piece(api: str, line: str) -> tuple[bool, int, int]:
    """Of a line of the answer: whether it carries text, and the counts of the answer's and the prompt's tokens where it says
    them (else 0)."""
    if api == "ollama":
        piece = json.loads(line)
        if "error" in piece:
            raise RuntimeError(piece["error"])
        message = piece.get("message", {})
        text = bool(message.get("content") or message.get("thinking"))
        return text, piece.get("eval_count", 0), piece.get("prompt_eval_count", 0)
    if not line.startswith("data: ") or line == "data: [DONE]":
        return False, 0, 0
    piece = json.loads(line[len("data: ") :])
    if "error" in piece:
        raise RuntimeError(str(piece["error"]))
    text = any(choice.get("delta", {}).get("content") for choice in piece.get("choices", []))
    usage = piece.get("usage") or {}
    return text, usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)


async def chat(client: httpx.AsyncClient, target: Target, asked: Chat) -> Stream:
    """Sends it and reads the answer to its end. A refusal or a broken answer is in `error`."""
    path, request = body(target, asked)
    stream = Stream(time.perf_counter(), wanted=asked.tokens)
    try:
        async with client.stream("POST", target.url + path, json=request) as response:
            if response.status_code != 200:
                stream.error = f"{response.status_code} {(await response.aread()).decode()[:200]}"
                return stream
            async for line in response.aiter_lines():
                if line.strip():
                    has_text, count, prompt = read_piece(target.api, line)
                    if has_text:
                        stream.arrivals.append(time.perf_counter())
                    stream.tokens = count or stream.tokens
                    stream.prompt_tokens = prompt or stream.prompt_tokens
    except (httpx.HTTPError, RuntimeError) as problem:
        stream.error = str(problem) or type(problem).__name__
    stream.tokens = stream.tokens or len(stream.arrivals)
    return stream


async def closed(target: Target, chats: Sequence[Chat], users: int) -> dict[str, float]:
    """`users` at once until all chats are answered."""
    waiting = list(reversed(chats))
    streams: list[Stream] = []

    async def user(client: httpx.AsyncClient) -> None:
        while waiting:
            streams.append(await chat(client, target, waiting.pop()))

    async with _client(users) as client:
        start = time.perf_counter()
        await asyncio.gather(*(user(client) for _ in range(users)))
        return summary(streams, time.perf_counter() - start)


async def opened(target: Target, chats: Sequence[Chat], rate: float) -> dict[str, float]:
    """`rate` chats a second on average, at exponential distances (a fixed seed), until all are answered."""
    distances = random.Random(0)

    async def later(client: httpx.AsyncClient, seconds: float, asked: Chat) -> Stream:
        await asyncio.sleep(seconds)
        return await chat(client, target, asked)

    async with _client(len(chats)) as client:
        start, at, tasks = time.perf_counter(), 0.0, []
        for asked in chats:
            tasks.append(later(client, at, asked))
            at += distances.expovariate(rate)
        streams = await asyncio.gather(*tasks)
        return summary(streams, time.perf_counter() - start)


def _client(connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """tokens_per_s of all that were answered, and percentiles in ms: to the first piece, and between pieces. `short`: answers
    that ended before they had as many tokens as were asked for."""
    answered = [stream for stream in streams if not stream.error]
    firsts = [stream.arrivals[0] - stream.sent for stream in answered if stream.arrivals]
    gaps = [later - earlier for stream in answered for earlier, later in pairwise(stream.arrivals)]
    tokens = sum(stream.tokens for stream in answered)
    # What one user sees as speed: tokens after the first, over the time they took.
    spans = [stream for stream in answered if len(stream.arrivals) > 1]
    rates = [(stream.tokens - 1) / (stream.arrivals[-1] - stream.arrivals[0]) for stream in spans]
    return {
        "chats": len(streams),
        "failed": len(streams) - len(answered),
        "short": sum(stream.tokens < stream.wanted for stream in answered),
        "prompt_tokens": sum(stream.prompt_tokens for stream in answered),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "stream_tokens_per_s": percentile(rates, 50),
        "ttft_p50_ms": percentile(firsts, 50) * 1e3,
        "ttft_p99_ms": percentile(firsts, 99) * 1e3,
        "gap_p50_ms": percentile(gaps, 50) * 1e3,
        "gap_p99_ms": percentile(gaps, 99) * 1e3,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least `percent` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)] if ordered else math.nan
