"""N concurrent streaming chats over HTTP: total output tokens/s, time to the first token, time between tokens.

    python -m bench.serve_http --url http://127.0.0.1:11434 --model smollm2:135m --users 16       any Ollama-compatible server
    python -m bench.serve_http --url http://127.0.0.1:8080 --api openai --model m --users 16      any OpenAI-compatible server
    python -m bench.serve_http --file smollm2 --users 16        our daemon beside llama-server -np 16 (LLAMA_CPP_BIN), in turn

The same prompts and numbers of tokens for every server, temperature 0; a client of its own process could do no more: this one
takes 20 us a token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import servers
from bench.cpu import MODELS, model_path
from bench.table import NONE, align
from ollamapy.lifecycle.devices import physical_cores

TOPICS = (
    *(
        "the sea",
        "a small village",
        "the invention of paper",
        "a lighthouse keeper",
        "how bread is made",
        "the moon",
        "a lost dog",
    ),
    *("the first train", "a garden in winter", "how rivers form", "an old clock", "the desert at night", "a busy market"),
    *("learning to swim", "a letter from far away", "the colour blue"),
)
ASK = "Write a long story about {}. Tell it slowly, with many details, and do not stop early. This is version {}."


@dataclass(slots=True)
class Stream:
    """One chat: when it was sent and when each piece of its answer came, in seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0  # as the server counts them; where it does not, pieces


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    model: str
    api: str  # ollama | openai


def prompt(number: int) -> str:
    """Different from its first words on, so that no server can answer two from one computation."""
    return ASK.format(TOPICS[number % len(TOPICS)], number)


def body(target: Target, text: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and JSON of a streaming chat."""
    shared = {"model": target.model, "messages": [{"role": "user", "content": text}], "stream": True}
    if target.api == "ollama":
        return "/api/chat", {**shared, "options": {"temperature": 0, "num_predict": tokens}}
    usage = {"stream_options": {"include_usage": True}}
    return "/v1/chat/completions", {**shared, **usage, "temperature": 0, "max_tokens": tokens}


def read_piece(api: str, line: str) -> tuple[bool, int]:
    """Of a line of the answer: whether it carries text, and the count of all tokens where it says it (else 0)."""
    if api == "ollama":
        piece = json.loads(line)
        if "error" in piece:
            raise RuntimeError(piece["error"])
        message = piece.get("message", {})
        return bool(message.get("content") or message.get("thinking")), piece.get("eval_count", 0)
    if not line.startswith("data: ") or line == "data: [DONE]":
        return False, 0
    piece = json.loads(line[len("data: ") :])
    text = any(choice.get("delta", {}).get("content") for choice in piece.get("choices", []))
    return text, (piece.get("usage") or {}).get("completion_tokens", 0)


async def chat(client: httpx.AsyncClient, target: Target, text: str, tokens: int) -> Stream:
    path, request = body(target, text, tokens)
    stream = Stream(time.perf_counter())
    async with client.stream("POST", target.url + path, json=request) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{target.url}: {response.status_code} {(await response.aread()).decode()[:200]}")
        async for line in lines(response):
            has_text, count = read_piece(target.api, line)
            if has_text:
                stream.arrivals.append(time.perf_counter())
            stream.tokens = count or stream.tokens
    stream.tokens = stream.tokens or len(stream.arrivals)
    return stream


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.strip():
            yield line


async def run(target: Target, users: int, tokens: int) -> dict[str, float]:
    """One round: all users at once, each on a connection of its own (llama-server closes those that were used). A chat of two
    tokens before loads the model."""
    limits = httpx.Limits(max_connections=users, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        await chat(client, target, "Hello", 2)
        start = time.perf_counter()
        chats = [chat(client, target, prompt(number), tokens) for number in range(users)]
        streams = await asyncio.gather(*chats)
        return summary(streams, time.perf_counter() - start)


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """tokens_per_s of all, and percentiles in ms of the time to the first piece and between pieces."""
    firsts = [stream.arrivals[0] - stream.sent for stream in streams if stream.arrivals]
    gaps = [later - earlier for stream in streams for earlier, later in zip(stream.arrivals, stream.arrivals[1:], strict=False)]
    tokens = sum(stream.tokens for stream in streams)
    # What single-user "eval rate" means: tokens after the first, over the time they took.
    spans = [stream for stream in streams if len(stream.arrivals) > 1]
    rates = [(stream.tokens - 1) / (stream.arrivals[-1] - stream.arrivals[0]) for stream in spans]
    return {
        "users": len(streams),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "decode_per_stream": percentile(rates, 50),
        "ttft_p50_ms": percentile(firsts, 50) * 1e3,
        "ttft_p99_ms": percentile(firsts, 99) * 1e3,
        "gap_p50_ms": percentile(gaps, 50) * 1e3,
        "gap_p99_ms": percentile(gaps, 99) * 1e3,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least `percent` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)] if ordered else math.nan


def render(rows: Sequence[dict[str, Any]]) -> str:
    header = list(rows[0])
    return "\n".join(align([header, *([cell(value) for value in row.values()] for row in rows)]))


def cell(value: str | float | None) -> str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def side_by_side(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Our daemon and llama-server on one file, in turn, each started anew; and what `ollamapy run --verbose` says."""
    path = model_path(args.file, args.folder)
    peer = os.environ.get("LLAMA_CPP_BIN", "")
    rows: list[dict[str, Any]] = []
    for turn in args.turns:
        with tempfile.TemporaryDirectory() as folder:
            if turn == "A":
                with servers.ours(Path(folder), path, args.threads) as ours:
                    first = {"first_token_s": ours.first_token_s}
                    for users in args.users:
                        found = asyncio.run(run(Target(ours.url, ours.model, "ollama"), users, args.tokens))
                        rows.append({"server": "ollamapy", **found, **first})
                    rows[-1] |= {"run_verbose_eval_rate": ours.eval_rate()}
            elif peer:
                for users in args.users:
                    with servers.llama(Path(peer), path, args.threads, users) as theirs:
                        found = asyncio.run(run(Target(theirs.url, theirs.model, "openai"), users, args.tokens))
                        rows.append({"server": "llama-server", **found, "first_token_s": theirs.first_token_s})
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of a server that runs")
    parser.add_argument("--api", choices=["ollama", "openai"], default="ollama")
    parser.add_argument("--model", default="")
    parser.add_argument("--file", default="smollm2", help=f"without --url: one of {', '.join(MODELS)}")
    parser.add_argument("--users", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer at most")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", default="ABA", help="A: ollamapy, B: llama-server")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    args = parser.parse_args()
    if args.url:
        target = Target(args.url.rstrip("/"), args.model, args.api)
        rows = [{"server": args.url, **asyncio.run(run(target, users, args.tokens))} for users in args.users]
    else:
        rows = side_by_side(args)
    print(render(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
