"""How long running chats wait for a next token while something else happens: nothing, a long prompt, another model's load.

    python -m bench.stalls --file smollm2 --chats 4 --prompt 4000
    python -m bench.stalls --file smollm2 --chats 4 --load gemma3

Our own daemon over HTTP, in a home of its own. Gaps are between pieces as one client sees them; p50, p99 and the longest, in
ms, of the pieces that came while it happened. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.cpu import MODELS, model_path
from bench.load import percentile
from bench.table import align
from bench.workloads import question
from ollamapy.lifecycle.devices import physical_cores
from tests import daemon

Event = Callable[[httpx.AsyncClient], Awaitable[float]]
IDLE_SECONDS = 4.0
WORDS = "river stone candle orchard winter letter garden market window bridge harbour violin"
CONTEXT = 8192


@dataclass(slots=True)
class Answer:
    """When its pieces came. `ended`: no other comes."""

    arrivals: list[float] = field(default_factory=list)
    ended: bool = False


class Chats:
    """Chats that go on until they are stopped, an answer after the other."""

    def __init__(self, client: httpx.AsyncClient, url: str, count: int) -> None:
        self.answers: list[Answer] = []
        self._tasks = [asyncio.create_task(self._one(client, url, number, count)) for number in range(count)]

    async def _one(self, client: httpx.AsyncClient, url: str, number: int, step: int) -> None:
        while True:
            options = {"temperature": 0.8, "num_predict": 4000, "seed": number}
            body = {"model": "chat", "prompt": question(number), "stream": True, "options": options}
            number += step
            answer = Answer()
            self.answers.append(answer)
            async with client.stream("POST", url + "/api/generate", json=body) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    answer.arrivals.append(time.perf_counter())
            answer.ended = True

    def gaps(self, start: float, end: float) -> dict[str, float]:
        """Between pieces of one answer, of those that came in (start, end] and of those that have not come yet."""
        found = []
        for answer in self.answers:
            seen = [at for at in answer.arrivals if at <= end]
            if seen and not (answer.ended and len(seen) == len(answer.arrivals)):
                seen.append(end)
            found += [later - earlier for earlier, later in pairwise(seen) if later > start]
        ends = {"gap_p50_ms": percentile(found, 50), "gap_p99_ms": percentile(found, 99), "gap_max_ms": max(found)}
        return {name: value * 1e3 for name, value in ends.items()}

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measured(url: str, count: int, happens: Event) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        await first_piece(client, url, {"model": "chat", "prompt": "Hello", "options": {"num_predict": 2}})
        chats = Chats(client, url, count)
        while sum(len(answer.arrivals) > 20 for answer in chats.answers) < count:
            await asyncio.sleep(0.05)
        rows: list[dict[str, Any]] = []
        for name, event in (("idle", _nothing), ("busy", happens), ("after", _nothing)):
            start = time.perf_counter()
            took = await event(client)
            rows.append({"while": name, "seconds": took, **chats.gaps(start, time.perf_counter())})
        await chats.stop()
    rows[1]["p99_over_idle"] = rows[1]["gap_p99_ms"] / rows[0]["gap_p99_ms"]
    return rows


async def _nothing(client: httpx.AsyncClient) -> float:
    await asyncio.sleep(IDLE_SECONDS)
    return IDLE_SECONDS


async def first_piece(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> float:
    """Seconds until its first token."""
    start = time.perf_counter()
    async with client.stream("POST", url + "/api/generate", json={**body, "stream": True}) as response:
        response.raise_for_status()
        await anext(response.aiter_lines())
    return time.perf_counter() - start


def long_prompt(tokens: int) -> str:
    """About so many tokens, the same with every server."""
    words = WORDS.split()
    return " ".join(words[(at * 7 + at // 12) % len(words)] for at in range(tokens))


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="smollm2", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the prompt that comes in between, about")
    parser.add_argument("--load", default="", help="a model to load in between, instead of a prompt")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        daemon.running(Path(folder), OLLAMA_CONTEXT_LENGTH=str(CONTEXT), OLLAMA_KEEP_ALIVE="-1") as running,
    ):
        for name in filter(None, ("chat", "other" if args.load else "")):
            path = model_path(args.file if name == "chat" else args.load, args.folder)
            modelfile = Path(folder) / "Modelfile"
            modelfile.write_text(f"FROM {path}\nPARAMETER num_thread {args.threads}\n")
            running.ok("create", name, "-f", str(modelfile))
        url = f"http://{running.host}"
        options = {"num_predict": 1, "temperature": 0}
        asked = {"model": "other", "prompt": "Hello", "options": options}
        if not args.load:
            asked = {"model": "chat", "prompt": long_prompt(args.prompt), "options": options}
        rows = asyncio.run(measured(url, args.chats, lambda client: first_piece(client, url, asked)))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\n".join(align([columns, *([_shown(row.get(column, "")) for column in columns] for row in rows)])))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
