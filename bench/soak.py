"""A daemon under mixed load for minutes: what it holds is sampled, a slope is fitted to each, and the end must be clean.

    python -m bench.soak --minutes 20 [--users 16] [--into bench/results/soak.json] [--set MALLOC_ARENA_MAX=1]

Clients chat (whole answers, early disconnects, long prompts, JSON output), embed, look around and send mistakes; a second
model is loaded and unloaded all the time; prefixes are kept on disk as by default, in a folder of this run. Sampled: memory of
their own (RssAnon + VmSwap), open files and threads of the daemon and of the engine that stays, the daemon's tasks, processes,
blocks. Exit status 1: an answer failed that should not, something grew (GROWTH), or after the load something is still held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import machine, servers
from bench.cpu import model_path
from bench.table import align
from bench.workloads import Chat, prose, question
from ollamapy.env import Settings
from ollamapy.lifecycle.devices import physical_cores
from tests.daemon import Daemon
from tests.scripted import write_scripted

EVERY = 2.0  # seconds between samples
WARM = 0.5  # of the time: caches fill, allocators find their size; left out of the slopes
GROWTH = {
    "memory": 0.03,
    "files": 0.1,
    "threads": 0.1,
    "processes": 0.1,
}  # of the middle value, over the time after WARM
SETTLE_SECONDS = 20.0  # for everything to be given back at the end
WORDS = [f"\u2581w{number}" for number in range(100)]  # of the tiny model's endless answer
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
MISTAKES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/api/chat", {"model": servers.NAME, "options": {"temperature": "hot"}}, 400),
    ("/api/generate", {"model": "not-here", "prompt": "x"}, 404),
    ("/v1/chat/completions", {"model": servers.NAME, "messages": []}, 400),
    ("/api/generate", {"model": servers.NAME, "prompt": "x", "format": {"type": "no such type"}}, 400),
)


class Clients:
    """What users do, chosen at random; `done` counts each kind, `failed` says what went wrong."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.url = f"http://{daemon.host}"
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.client = httpx.AsyncClient(timeout=120, trust_env=False)

    async def user(self, until: float) -> None:
        kinds: Sequence[Callable[[], Awaitable[None]]]
        kinds = [self.chat] * 8 + [self.leave] * 4 + [self.long] + [self.strict] * 2 + [self.embed] + [self.mistake] * 2
        kinds += [self.look] * 2
        while time.monotonic() < until:
            kind = self.random.choice(kinds)
            try:
                await kind()
                self.done[kind.__name__] += 1
            except (httpx.HTTPError, AssertionError, ValueError) as problem:
                self.failed[f"{kind.__name__}: {type(problem).__name__} {problem}"[:200]] += 1

    async def _stream(self, asked: Chat, pieces: int | None = None, **fields: Any) -> dict[str, Any]:
        """The last line of a streamed chat, or of its first `pieces` lines before the client leaves."""
        options = {"num_predict": asked.tokens, "temperature": self.random.choice([0.0, 0.8])}
        request = {"model": servers.NAME, "messages": asked.messages, "options": options, **fields}
        last: dict[str, Any] = {}
        async with self.client.stream("POST", f"{self.url}/api/chat", json=request) as response:
            assert response.status_code == 200, f"{response.status_code} {(await response.aread()).decode()[:100]}"
            seen = 0
            async for line in response.aiter_lines():
                if seen == pieces:
                    break
                last, seen = json.loads(line), seen + 1
                assert "error" not in last, last
        return last

    def _short(self) -> Chat:
        return Chat(question(self.random.randrange(10**6)), tokens=self.random.randrange(1, 64))

    async def chat(self) -> None:
        assert (await self._stream(self._short()))["done"]

    async def leave(self) -> None:
        await self._stream(self._short(), pieces=self.random.randrange(0, 8))

    async def long(self) -> None:
        text = prose(self.random.randrange(200, 1200), self.random.randrange(50))  # one in a while is in the prefix cache
        assert (await self._stream(Chat(text, tokens=8)))["done"]

    async def strict(self) -> None:
        await self._stream(self._short(), format=SCHEMA)

    async def embed(self) -> None:
        request = {"model": servers.NAME, "input": [question(self.random.randrange(100)) for _ in range(3)]}
        response = await self.client.post(f"{self.url}/api/embed", json=request)
        assert response.status_code == 200 and len(response.json()["embeddings"]) == 3, response.text[:100]

    async def mistake(self) -> None:
        path, request, status = self.random.choice(MISTAKES)
        response = await self.client.post(self.url + path, json=request)
        assert response.status_code == status, f"{path} answered {response.status_code}: {response.text[:100]}"

    async def look(self) -> None:
        """What is asked beside the work: models that come and go must not be in its way."""
        for path in ("/api/ps?verbose=true", "/api/tags"):
            response = await self.client.get(self.url + path)
            assert response.status_code == 200, response.text[:100]
        shown = await self.client.post(f"{self.url}/api/show", json={"model": servers.NAME})
        assert shown.status_code == 200, shown.text[:100]

    async def churn(self, model: str, until: float) -> None:
        """Loads and unloads another model."""
        while time.monotonic() < until:
            for fields in ({"prompt": "Hello", "options": {"num_predict": 2}}, {"keep_alive": 0}):
                response = await self.client.post(f"{self.url}/api/generate", json={"model": model, "stream": False, **fields})
                assert response.status_code == 200, response.text[:200]
            self.done["load and unload"] += 1
            await asyncio.sleep(2)


def own_memory(pid: int) -> int:
    """Bytes that no file backs, in memory or swapped out: what a leak grows, wherever the kernel puts it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(size) << 10 for size in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", status, re.MULTILINE))


class Samples:
    """Rows of what the daemon and the engine that stays hold, one for each look."""

    def __init__(self, daemon: Daemon) -> None:
        assert daemon.process is not None
        self.url, self.daemon = f"http://{daemon.host}", psutil.Process(daemon.process.pid)
        self.start = time.monotonic()
        self.rows: list[dict[str, float]] = []

    async def look(self) -> dict[str, float]:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            told = (await client.get(f"{self.url}/api/ps", params={"verbose": "true"})).json()
        engine = next(model["engine"] for model in told["models"] if model["name"].startswith(servers.NAME))
        row = {"seconds": time.monotonic() - self.start, "processes": float(len(self.daemon.children(recursive=True)))}
        row["daemon tasks"] = float(told["daemon"]["tasks"])
        for name, process in (("daemon", self.daemon), ("engine", psutil.Process(engine["pid"]))):
            with process.oneshot():
                row |= {f"{name} memory": own_memory(process.pid) / 2**20, f"{name} files": float(process.num_fds())}
                row[f"{name} threads"] = float(process.num_threads())
        figures = ("used_blocks", "cached_blocks", "free_blocks", "num_running", "num_waiting")
        return row | {name.replace("_", " "): float(engine["stats"][name]) for name in figures}

    async def watch(self, until: float, say: Callable[[str], None]) -> None:
        told = 0.0
        while time.monotonic() < until:
            self.rows.append(await self.look())
            if time.monotonic() - told > 30:
                told = time.monotonic()
                say(", ".join(f"{name} {value:.0f}" for name, value in self.rows[-1].items()))
            await asyncio.sleep(EVERY)

    async def settled(self) -> dict[str, float]:
        """What is held once nothing is in use, or when SETTLE_SECONDS are over."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (row := await self.look())["used blocks"] + row["num running"] and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        return row


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil-Sen: the median slope between pairs of points, 0.0 of fewer than two (Sen 1968). Of at most 300 points."""
    thinned = points[:: max(1, len(points) // 300)]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(thinned, 2) if x2 > x1]
    return statistics.median(slopes) if slopes else 0.0


def slopes(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Name -> middle value, slope an hour, and growth: what the slope makes of the time after WARM, as part of the middle."""
    kept = [row for row in rows if row["seconds"] >= WARM * rows[-1]["seconds"]]
    found = {}
    for name in kept[0]:
        if name != "seconds":
            each, middle = slope([(row["seconds"], row[name]) for row in kept]), statistics.median(row[name] for row in kept)
            growth = each * (kept[-1]["seconds"] - kept[0]["seconds"]) / max(middle, 1.0)
            found[name] = {"middle": middle, "per_hour": each * 3600, "growth": growth}
    return found


def faults(report: dict[str, Any]) -> list[str]:
    """What a clean run does not have."""
    found = [f"{count} times: {text}" for text, count in report["failed"].items()]
    for name, figures in report["slopes"].items():
        limit = next((limit for kind, limit in GROWTH.items() if name.endswith(kind)), None)
        if limit is not None and figures["growth"] > limit:
            found.append(f"{name} grew by {figures['growth']:.1%} (limit {limit:.0%})")
    held = {name: report["end"][name] for name in ("used blocks", "num running", "num waiting") if report["end"][name]}
    if (tasks := report["end"]["daemon tasks"]) > report["begin"]["daemon tasks"]:
        held["daemon tasks"] = tasks
    found += [f"still held at the end: {name} {value:.0f}" for name, value in held.items()]
    return found


async def soak(daemon: Daemon, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    clients, samples = Clients(daemon, options.seed), Samples(daemon)
    begin = await samples.look()
    until = time.monotonic() + options.minutes * 60
    tasks = [clients.user(until) for _ in range(options.users)]
    if options.churn:
        tasks.append(clients.churn("churn", until))
    await asyncio.gather(samples.watch(until, say), *tasks)
    await clients.client.aclose()
    end = await samples.settled()
    kept = {"done": clients.done, "failed": clients.failed, "begin": begin, "end": end, "slopes": slopes(samples.rows)}
    return {"machine": machine.facts(), "minutes": options.minutes, "users": options.users, **kept, "rows": samples.rows}


def render(report: dict[str, Any]) -> str:
    header = ["", "begin", "middle", "end", "an hour", "growth"]
    rows = []
    for name, each in report["slopes"].items():
        values = (report["begin"][name], each["middle"], report["end"][name])
        rows.append([name, *(f"{value:.0f}" for value in values), f"{each['per_hour']:+.1f}", f"{each['growth']:+.2%}"])
    done = ", ".join(f"{count} {name}" for name, count in report["done"].items())
    lines = [f"{report['minutes']:g} minutes, {report['users']} users: {done}", "", *align([header, *rows]), ""]
    return "\n".join([*lines, *(faults(report) or ["clean: nothing failed, nothing grew, nothing is held"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tiny", action="store_true", help="a model of kilobytes that stays: many more requests")
    parser.add_argument("--churn", default="gemma3", help='model that is loaded and unloaded meanwhile ("": none)')
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the daemon's environment"
    )
    parser.add_argument("--into", type=Path, help="JSON to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shipped = {"OLLAMAPY_PREFIX_CACHE_BYTES": str(Settings().prefix_cache_bytes), "XDG_CACHE_HOME": str(home / "cache")}
        variables = {**shipped, **dict(pair.split("=", 1) for pair in options.set)}
        path = write_scripted(home / "tiny.gguf", WORDS, loop=True) if options.tiny else model_path("smollm2", home)
        with servers.ours(home, path, options.threads, **variables) as running:
            assert running.daemon is not None
            if options.churn:
                modelfile = home / "Churn"
                modelfile.write_text(f"FROM {model_path(options.churn, home)}\n")
                running.daemon.ok("create", "churn", "-f", str(modelfile))
            report = asyncio.run(soak(running.daemon, options, lambda text: print(text, file=sys.stderr, flush=True)))
    if options.into:
        options.into.parent.mkdir(parents=True, exist_ok=True)
        options.into.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    sys.exit(1 if faults(report) else 0)


if __name__ == "__main__":
    main()
