"""Many users over HTTP: our daemon, llama-server and vLLM's CPU build on the same model and prompts, in turn.

    python -m bench.serve [--files smollm2,gemma3] [--turns ABCA] [--into bench/results/serve.json]
    python -m bench.serve --url http://127.0.0.1:11434 --model smollm2:135m [--api ollama]     any server that runs

Closed loops of 1 to 64 users with short chats; a shared system prompt of 1,000 tokens, and as many separate ones; long prompts
among short ones; open loops at rising rates. llama-server is taken from the folder LLAMA_CPP_BIN and started with a slot for
each user. vLLM is the program VLLM, its models are transformers folders named by VLLM_MODELS="smollm2=folder,gemma3=folder".
The table is of medians over the turns; the JSON has every round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import load, machine, serve_plot, servers
from bench.cpu import MODELS, model_path
from bench.llama_cpp import PeerError
from bench.load import Target
from bench.table import NONE, align
from bench.workloads import WORKLOADS, Chat
from ollamapy.lifecycle.devices import physical_cores

RESULTS = Path(__file__).parent / "results"
OURS, LLAMA, VLLM = "ollamapy", "llama-server", "vLLM bf16"
USERS = (1, 4, 16, 32, 64)
RATES = (2.0, 4.0, 8.0)  # chats a second
OPEN_SECONDS = 8.0  # of arrivals
ROUNDS = 2  # chats of each user of a closed loop
BESIDE = 16  # users of the workloads other than short chats
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement: `level` users of a closed loop, or chats a second of an open one."""

    workload: str
    level: float
    open: bool = False

    @property
    def slots(self) -> int:
        """Chats that a server must be able to work on at once."""
        return int(self.level) if not self.open else 2 * BESIDE

    @property
    def name(self) -> str:
        return f"{self.workload} {self.level:g}{'/s' if self.open else ''}"

    def chats(self, seed: int) -> Sequence[Chat]:
        count = round(self.level * (OPEN_SECONDS if self.open else ROUNDS))
        return WORKLOADS[self.workload](max(count, 2), seed)

    async def run(self, target: Target, seed: int) -> dict[str, float]:
        """A chat of two tokens before loads the model; `shared` is measured with its system prompt seen once.

        A seed for each round: a server with a prefix cache must not find the prompts of the last one.
        """
        warm = self.chats(seed)[0] if self.workload == "shared" else Chat("Hello")
        await load.closed(target, [Chat(warm.text, warm.system, tokens=2)], 1)
        measure = load.opened if self.open else load.closed
        return await measure(target, self.chats(seed), self.level if self.open else int(self.level))


def rounds(users: Iterable[int], rates: Iterable[float], workloads: Iterable[str] = WORKLOADS) -> list[Round]:
    others = [Round(name, BESIDE) for name in workloads if name != "short"]
    return [*(Round("short", count) for count in users), *others, *(Round("short", rate, open=True) for rate in rates)]


@dataclass(frozen=True, slots=True)
class Host:
    """Starts servers for one model. A server that is not installed has no turn."""

    file: str
    path: Path
    threads: int

    def server(self, turn: str) -> str:
        """The name of who has this turn, "" when it is not here."""
        if turn == "A":
            return OURS
        if turn == "B":
            return LLAMA if os.environ.get("LLAMA_CPP_BIN") else ""
        return VLLM if os.environ.get("VLLM") and self.file in servers.vllm_folders() else ""

    def groups(self, turn: str, work: Sequence[Round]) -> list[list[Round]]:
        """Rounds that one start of the server serves: llama-server has its number of slots fixed at its start."""
        if turn != "B":
            return [list(work)]
        return [[each for each in work if each.slots == slots] for slots in dict.fromkeys(each.slots for each in work)]

    @contextmanager
    def running(self, turn: str, slots: int) -> Iterator[servers.Running]:
        if turn == "A":
            with tempfile.TemporaryDirectory() as folder, servers.ours(Path(folder), self.path, self.threads) as started:
                yield started
        elif turn == "B":
            with servers.llama(Path(os.environ["LLAMA_CPP_BIN"]), self.path, self.threads, slots) as started:
                yield started
        else:
            with servers.vllm(Path(os.environ["VLLM"]), servers.vllm_folders()[self.file], self.path, self.threads) as started:
                yield started


def measure(host: Host, work: Sequence[Round], turns: str, say: Say) -> dict[str, Any]:
    """All rounds of one model, each {server, turn, workload, level, open, ...figures}, and what was learnt beside them."""
    rows: list[dict[str, Any]] = []
    firsts: dict[str, list[float]] = {}
    rates: list[float] = []
    for number, turn in enumerate(turns):
        server = host.server(turn)
        if not server:
            say(f"{host.file}: no server for turn {turn}")
            continue
        for group in host.groups(turn, work):
            with host.running(turn, max(each.slots for each in group)) as running:
                firsts.setdefault(server, []).append(running.first_token_s)
                for each in group:
                    found = asyncio.run(each.run(Target(running.url, running.model), seed=1 + work.index(each)))
                    rows.append({"server": server, "turn": number, **asdict(each), **found})
                    say(f"{host.file} {server} {each.name}: {_line(found)}")
                if running.daemon is not None and any(each.level == 1 for each in group):
                    rates.append(running.eval_rate())
    first = {server: statistics.median(seconds) for server, seconds in firsts.items()}
    facts = {"first_token_s": first, "run_verbose_eval_rate": statistics.median(rates) if rates else None}
    return {"file": host.file, "rounds": rows, **facts, "commit": machine.commit(), "load_average": machine.load_average()}


def _line(found: dict[str, float]) -> str:
    text = f"{found['tokens_per_s']:.0f} tokens/s, first token p50 {found['ttft_p50_ms']:.0f} p99 {found['ttft_p99_ms']:.0f} ms"
    failed = f", {found['failed']:.0f} of {found['chats']:.0f} FAILED" if found["failed"] else ""
    failed += f", {found['short']:.0f} answers too short" if found["short"] else ""
    return f"{text}, gap p50 {found['gap_p50_ms']:.1f} p99 {found['gap_p99_ms']:.1f} ms{failed}"


def medians(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(round's name, server) -> figure -> median over the turns."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = Round(row["workload"], row["level"], row["open"]).name
        groups.setdefault((name, row["server"]), []).append(row)
    figures = ("tokens_per_s", "stream_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms")
    counts = ("failed", "short", "chats", "prompt_tokens")  # of all turns: one that failed shows, whatever the others did
    return {
        key: {each: statistics.median(row[each] for row in found) for each in figures}
        | {each: sum(row.get(each, math.nan) for row in found) for each in counts}  # older reports have not all of them
        for key, found in groups.items()
    }


def render(model: dict[str, Any]) -> str:
    """A table of one model: a row for each round and server, with our ratio to that peer."""
    found = medians(model["rounds"])
    header = ["round", "server", "tokens/s", "ours is", "TTFT p50 ms", "p99", "ours is", "gap p50 ms", "p99"]
    header += ["prompt", "short", "failed"]  # tokens of a prompt on average, answers that ended early, chats that failed
    table = [header]
    for (name, server), row in found.items():
        ours = found.get((name, OURS), row)
        peer = server != OURS
        table.append(
            [
                name,
                server,
                _cell(row["tokens_per_s"]),
                f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}x" if peer and row["tokens_per_s"] else "",
                _cell(row["ttft_p50_ms"]),
                _cell(row["ttft_p99_ms"]),
                f"{ours['ttft_p99_ms'] / row['ttft_p99_ms']:.2f}x" if peer else "",
                _cell(row["gap_p50_ms"]),
                _cell(row["gap_p99_ms"]),
                _cell(_prompt_length(row)),
                _cell(row["short"]),
                _cell(row["failed"]),
            ]
        )
    order = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in found))}
    body = sorted(table[1:], key=lambda cells: order[cells[0]])
    starts = ", ".join(f"{server} {seconds:.2f} s" for server, seconds in model["first_token_s"].items())
    notes = [
        f"{model['file']}, commit {model['commit']}, load average {model['load_average']}",
        f"first token after start: {starts}",
    ]
    if model["run_verbose_eval_rate"]:
        notes.append(f"`ollamapy run --verbose` says {model['run_verbose_eval_rate']:.1f} tokens/s")
    return "\n".join([*notes, "", *align([header, *body])])


def _prompt_length(row: dict[str, float]) -> float:
    """Tokens of a prompt on average, as the server counts them; NaN where it does not."""
    answered = row["chats"] - row["failed"]
    return float(round(row["prompt_tokens"] / answered)) if answered > 0 and row["prompt_tokens"] > 0 else math.nan


def _cell(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def compare(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Measures the files and adds them to the report at `options.into`, which is written after each."""
    old: dict[str, Any] = json.loads(options.into.read_text()) if options.into.exists() else {}
    models = {model["file"]: model for model in old.get("models", [])}
    report: dict[str, Any] = {}
    for file in options.files.split(","):
        start = time.perf_counter()
        host = Host(file, model_path(file, options.folder), options.threads)
        models[file] = measure(host, rounds(options.users, options.rates, options.workloads), options.turns, say)
        report = {"machine": machine.facts(), "threads": options.threads, "models": list(models.values())}
        options.into.parent.mkdir(parents=True, exist_ok=True)
        options.into.write_text(json.dumps(report, indent=1) + "\n")
        say(f"{file}: {time.perf_counter() - start:.0f} s; {serve_plot.draw(report, options.into.with_suffix('.png'))}")
    return report


def one(options: argparse.Namespace, say: Say) -> None:
    """Closed loops of short chats against a server that runs."""
    target = Target(options.url.rstrip("/"), options.model, options.api)
    for users in options.users:
        found = asyncio.run(Round("short", users).run(target, seed=1))
        say(f"{users} users: {_line(found)}")
        print(json.dumps({"users": users, **found}))


def parse() -> argparse.Namespace:
    def numbers(kind: type) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of a server that runs; without it, servers are started")
    parser.add_argument("--api", choices=["ollama", "openai"], default="openai", help="of --url")
    parser.add_argument("--model", default="", help="of --url")
    parser.add_argument("--files", default="smollm2,gemma3", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--users", type=numbers(int), default=list(USERS), help="of the closed loops (1,4,16,32,64)")
    parser.add_argument("--rates", type=numbers(float), default=list(RATES), help="chats/s of the open loops (2,4,8)")
    parser.add_argument("--workloads", type=numbers(str), default=list(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", default="ABCA", help="A: ollamapy, B: llama-server, C: vLLM")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    parser.add_argument("--into", type=Path, default=RESULTS / "serve.json", help="report to write or to add to")
    return parser.parse_args()


def main() -> None:
    options = parse()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.url:
        return one(options, say)
    try:
        report = compare(options, say)
    except PeerError as problem:
        raise SystemExit(str(problem)) from None
    for model in report["models"]:
        print(render(model), end="\n\n")


if __name__ == "__main__":
    main()
