"""What one user loses between the engine and the terminal: tokens/s and processor time per token, one after the other.

`python -m bench.overhead MODEL`. The same requests to an engine of this process that nothing is around, to the daemon by
HTTP, and by `run --verbose`, in turns on one machine: what the hour does to one it does to all. Nothing is guessed ahead, or
it would matter how much an answer repeats itself.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from bench import servers
from bench.engine import Bench
from bench.servers import Running
from ollamapy.api.options import Options
from ollamapy.engine.protocol import SamplingParams
from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile
from ollamapy.server.answer import sampling
from ollamapy.tokenizer import Tokenizer

TOKENS = 128
STORY = "Write a long story about a journey, version {}."
WANTED = {"HTTP, client": 0.93, "run --verbose": 0.95}  # of the engine alone


class Sample(NamedTuple):
    """tokens/s after the first token, by who says it; ms of processor time per token, by process."""

    rates: dict[str, float]
    work: dict[str, float]


class Alone:
    """The engine in this process, with the daemon's options and its rendering of the prompt."""

    def __init__(self, path: Path, threads: int, running: Running) -> None:
        self._bench, self._running = Bench(path, threads), running
        with GGUFFile.open(path) as file:
            self._tokenizer = Tokenizer.from_gguf(normalise(file.metadata, file.tensors)[0])

    def __call__(self, number: int) -> Sample:
        options = Options(num_predict=TOKENS, seed=number, speculation="off")
        params: SamplingParams = sampling(options, self._tokenizer, (), servers.CONTEXT)
        engine = self._bench.engine
        engine.add(-1 - number, self._tokenizer.encode(self._rendered(number), add_special=True), params)
        while not self._bench.outputs():
            pass
        start, used, count = time.perf_counter(), time.process_time(), 0
        while engine.has_work:
            count += sum(len(output.token_ids) for output in self._bench.outputs())
        seconds = time.perf_counter() - start
        return Sample({"engine alone": count / seconds}, {"engine alone": (time.process_time() - used) / count * 1e3})

    def _rendered(self, number: int) -> str:
        request = {"model": self._running.model, "prompt": STORY.format(number), "_debug_render_only": True, "stream": False}
        answer = httpx.post(f"{self._running.url}/api/generate", json=request, trust_env=False)
        text: str = answer.raise_for_status().json()["_debug_info"]["rendered_template"]
        return text


def by_http(running: Running, number: int) -> Sample:
    """A streamed answer to a request of this process."""
    options = {"num_predict": TOKENS, "seed": number}
    request = {"model": running.model, "prompt": STORY.format(number), "options": options}
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=servers.START_SECONDS)
    before = _used(running.pid)
    connection.request("POST", "/api/generate", json.dumps(request), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.readline()
    start, last = time.perf_counter(), b""
    while line := answer.readline():
        last = line
    seconds = time.perf_counter() - start
    after = _used(running.pid)
    connection.close()
    told = json.loads(last)
    count = told["eval_count"]
    rates = {"HTTP, client": (count - 1) / seconds, "HTTP, daemon's word": (count - 1) / told["eval_duration"] * 1e9}
    return Sample(rates, {name: (after[name] - before[name]) / count * 1e3 for name in before})


def by_cli(running: Running, number: int) -> Sample:
    assert running.daemon is not None
    done = running.daemon.cli("run", running.model, "--verbose", STORY.format(number))
    found = re.search(r"^eval rate:\s+([0-9.]+)", done.stdout + done.stderr, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no eval rate in: {done.stderr[-500:]}")
    return Sample({"run --verbose": float(found.group(1))}, {})


def _used(daemon: int) -> dict[str, float]:
    """Seconds of processor time so far. The engine's include its prompt."""
    top = psutil.Process(daemon)
    engine = max(top.children(recursive=True), key=lambda process: process.create_time())
    each = {"HTTP, engine": engine, "HTTP, daemon": top, "HTTP, client": psutil.Process()}
    times = {name: process.cpu_times() for name, process in each.items()}
    return {name: time.user + time.system for name, time in times.items()}


def measure(ways: list[Callable[[int], Sample]], turns: int) -> list[Sample]:
    """Each way after the other, then backwards, and so on; the first answers of all are left out."""
    for way in ways:
        way(0)
    order = [way for turn in range(turns) for way in (ways if turn % 2 == 0 else ways[::-1])]
    return [way(number) for number, way in enumerate(order, start=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.ours(Path(folder) / "home", args.model, args.threads, OLLAMAPY_SPECULATION="off") as running,
    ):
        alone = Alone(args.model, args.threads, running)
        ways: list[Callable[[int], Sample]] = [
            alone,
            lambda number: by_http(running, number),
            lambda number: by_cli(running, number),
        ]
        samples = measure(ways, args.turns)
    show([sample.rates for sample in samples], [sample.work for sample in samples])


def show(rates: list[dict[str, float]], work: list[dict[str, float]]) -> None:
    base = statistics.median(_all(rates, "engine alone"))
    for name in dict.fromkeys(name for sample in rates for name in sample):
        found = _all(rates, name)
        middle = statistics.median(found)
        wanted = f", wanted {WANTED[name]:.2f}" if name in WANTED else ""
        share = f"{middle / base:.2f} of the engine alone{wanted}"
        print(f"{name}: {middle:.0f} tokens/s ({min(found):.0f} to {max(found):.0f}), {share}")
    for name in dict.fromkeys(name for sample in work for name in sample):
        print(f"{name}: {statistics.median(_all(work, name)):.2f} ms of processor time per token")


def _all(samples: list[dict[str, float]], name: str) -> list[float]:
    return [sample[name] for sample in samples if name in sample]


if __name__ == "__main__":
    main()
