"""Our engine beside llama.cpp and vLLM on a CPU: same file, same threads, in turn.

Prints a table and a JSON line; saves JSON and PNG.

    python -m bench.cpu [--models smollm2,gemma3,...] [--short] [--into bench/results/cpu.json]

llama.cpp's tools are taken from the folder LLAMA_CPP_BIN; vLLM is the program VLLM, with the same weights in bf16 in the
transformers folders VLLM_MODELS="smollm2=folder,gemma3=folder". A peer that is not there has no turn. Every measurement is a
process of its own. `--into` adds to a report that is there, so that files can be measured in several sittings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import figures, llama_cpp, machine, plot, servers, starts, table, vllm
from bench.figures import Samples, Work
from bench.llama_cpp import PeerError
from bench.make_model import SHAPES, make
from bench.quiet import Quiet, adopt
from ollamapy.lifecycle.devices import physical_cores
from tests import real_models
from tests.conftest import golden

RESULTS = Path(__file__).parent / "results"
OURS = "ollamapy"
GOLDEN = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}
Say = Callable[[str], None]
Peer = Callable[[Sequence[Work]], list[Samples]]
RANDOM = {f"llama-1b-{mix.lower()}": mix for mix in ("Q4_K_M", "Q6_K", "Q8_0", "Q4_0")}
MODELS = (*GOLDEN, *RANDOM)
STARTS = 3  # loads of each
TURNS = {"A": OURS, "B": llama_cpp.NAME, "C": vllm.NAME}


def model_path(name: str, folder: Path) -> Path:
    """The file; real ones are downloaded, random ones written, once."""
    if name in GOLDEN:
        return real_models.fetch(name)
    return make(folder / f"random-{name}.gguf", SHAPES["llama-1b"], RANDOM[name])


def run_ours(path: Path, work: Work, golden_name: str = "") -> dict[str, Any]:
    """One process of `bench.engine`. Its log goes to our standard error."""
    command = [sys.executable, "-m", "bench.engine", str(path), "--threads", str(work.threads), "--repeats", str(work.repeats)]
    command += ["--batches", ",".join(map(str, work.batches)), "--golden", golden_name]
    command += ["--no-prefill"] * (not work.prefill) + ["--no-single"] * (not work.single)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT)
    if done.returncode:
        raise SystemExit(f"the engine failed on {path}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peers_of(name: str, path: Path, threads: int) -> dict[str, Peer]:
    """Who is here, of llama.cpp and vLLM."""
    found: dict[str, Peer] = {}
    tools, program, folder = os.environ.get("LLAMA_CPP_BIN"), os.environ.get("VLLM"), servers.vllm_folders().get(name)
    if tools:
        found[llama_cpp.NAME] = lambda works: [llama_cpp.measure(Path(tools), path, work) for work in works]
    if program and folder:

        def ask(works: Sequence[Work]) -> list[Samples]:
            with servers.vllm(Path(program), folder, path, threads) as running:
                return [vllm.measure(running.url, work) for work in works if work.threads == threads]

        found[vllm.NAME] = ask
    return found


class Sitting:
    """One model's measurements. A peer that fails is left out from then on, and the report says why."""

    def __init__(self, name: str, path: Path, threads: int, quiet: Quiet, say: Say) -> None:
        self.name, self.path, self.threads, self.quiet, self.say = name, path, threads, quiet, say
        self.peers = peers_of(name, path, threads)
        self.samples: dict[str, list[Samples]] = {OURS: []}
        self.starts: dict[str, starts.Start] = {}
        self.failures: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def turn(self, engine: str, works: Sequence[Work]) -> None:
        """One start of vLLM, which takes a minute, serves all works; the others start for each."""
        for group in [works] if engine == vllm.NAME else [[work] for work in works]:
            start = time.perf_counter()
            if engine == OURS:
                self._ours(group[0])
            elif engine in self.peers:
                self._peer(engine, group)
            else:
                return self.say(f"  {self.name}: {engine} is not here")
            columns = ", ".join(column for work in group for column in work.columns)
            self.say(f"  {self.name}, {engine}, {columns}: {time.perf_counter() - start:.0f} s")

    def _peer(self, engine: str, works: Sequence[Work]) -> None:
        into = self.samples.setdefault(engine, [])
        self.ask(engine, lambda: into.extend(self.quiet.run(lambda: self.peers[engine](works))))

    def _ours(self, work: Work) -> None:
        wants_kl = GOLDEN.get(self.name, "") if not self.facts else ""
        found = self.quiet.run(lambda: run_ours(self.path, work, wants_kl))
        self.samples[OURS].append(found.pop("samples"))
        self.facts = {**found, **self.facts}

    def ask(self, engine: str, run: Callable[[], None]) -> None:
        try:
            if engine not in self.failures:
                run()
        except PeerError as problem:
            self.failures[engine] = str(problem)
            self.say(f"  {self.name}, {engine} is left out: {problem}")

    def start(self) -> None:
        """Loads to the first token, and memory, of ours and llama.cpp, in turn: medians."""
        found: dict[str, list[starts.Start]] = {}
        folder = os.environ.get("LLAMA_CPP_BIN")
        for _ in range(STARTS):
            found.setdefault(OURS, []).append(self.quiet.run(lambda: starts.ours(self.path, self.threads)))
            if folder:
                self.ask(llama_cpp.NAME, lambda: found.setdefault(llama_cpp.NAME, []).append(self._start_llama(Path(folder))))
        for engine, each in found.items():
            self.starts[engine] = {key: statistics.median(start[key] for start in each) for key in each[0]}

    def _start_llama(self, folder: Path) -> starts.Start:
        return self.quiet.run(lambda: starts.llama(folder, self.path, self.threads))

    def row(self) -> dict[str, Any]:
        engines = {engine: figures.merge(samples) for engine, samples in self.samples.items()}
        row = {"name": self.name, "file": self.path.name, **self.facts, "engines": engines, "starts": self.starts}
        if "kl" in row:
            row["kl"] = {OURS: row["kl"], llama_cpp.NAME: golden(GOLDEN[self.name])[llama_cpp.NAME]["mean_kl"]}
        return {**row, "failures": self.failures, "commit": machine.commit(), "others_cpu": max(self.quiet.others)}


def measure(name: str, path: Path, works: list[Work], options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """One row of the report. `options.turns`: who measures when, by the letters of TURNS."""
    before = machine.load_average()
    sitting = Sitting(name, path, options.threads, Quiet(options.patience), say)
    for turn in options.turns:
        sitting.turn(TURNS[turn], works)
    if not options.short:
        sitting.start()
    return {**sitting.row(), "load_average": [before, machine.load_average()]}


def reports(names: list[str], works: list[Work], options: argparse.Namespace, say: Say) -> Iterator[dict[str, Any]]:
    """What is saved, again after each model. Models that a report at `options.into` has already are kept."""
    if not os.environ.get("LLAMA_CPP_BIN"):
        say("LLAMA_CPP_BIN is not set: nothing to compare with")
    old: dict[str, Any] = json.loads(options.into.read_text()) if options.into and options.into.exists() else {}
    limits = machine.limits(options.threads)
    if not limits:
        say("no C compiler for this CPU's probes: fractions of its limits are left out")
    limits = {key: max(value, old.get("limits", {}).get(key, 0.0)) for key, value in limits.items()}
    columns = list(dict.fromkeys([*old.get("columns", []), *(column for work in works for column in work.columns)]))
    done, facts = {row["name"]: row for row in old.get("models", [])}, machine.facts()
    for number, name in enumerate(names, 1):
        path, start = model_path(name, options.folder), time.perf_counter()
        say(f"{name}, {number} of {len(names)}")
        done[name] = measure(name, path, works, options, say)
        say(f"{name}: {time.perf_counter() - start:.0f} s, others used up to {done[name]['others_cpu']:.1%} of the cores")
        rows = [done[name] for name in MODELS if name in done]
        yield {"machine": facts, "threads": options.threads, "limits": limits, "columns": columns, "models": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeats", type=int, default=3, help="of each column in each turn")
    parser.add_argument("--turns", default="ABCA", help=", ".join(f"{turn}: {engine}" for turn, engine in TURNS.items()))
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, per model")
    parser.add_argument("--short", action="store_true", help="the real models, prefill and one sequence")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    parser.add_argument("--into", type=Path, help="report to write or to add to (default: results/cpu-TIME.json)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    adopt()  # vLLM's engine is a child of its server, which does not wait for it
    names = list(GOLDEN) if options.short else options.models.split(",")
    unknown = set(names) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models {', '.join(sorted(unknown))} (known: {', '.join(MODELS)})")
    if strange := set(options.turns) - set(TURNS):
        raise SystemExit(f"unknown turns {', '.join(sorted(strange))} (known: {', '.join(TURNS)})")
    work = Work(options.threads, options.repeats)
    less = max(options.repeats - 1, 1)  # of the long ones: all six files in a quarter of an hour
    alone = Work(1, less, prefill=False, batches=())
    works = [replace(work, batches=())]
    if not options.short:
        works += [replace(work, prefill=False, single=False, repeats=less)] + [alone] * (options.threads > 1)
    found: dict[str, Any] = {}
    for found in reports(names, works, options, lambda text: print(text, file=sys.stderr, flush=True)):
        if not options.short or options.into:
            target = options.into or RESULTS / f"cpu-{found['machine']['time'].replace(':', '')[:15]}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(found, indent=1) + "\n")
            print(f"saved {target}; {plot.draw(found, target.with_suffix('.png'))}", file=sys.stderr, flush=True)
    print(table.render(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
