"""Our engine beside llama.cpp on a CPU: same file, same threads, in turn. Prints a table and a JSON line; saves JSON and PNG.

    python -m bench.cpu [--models smollm2,gemma3,...] [--short] [--into bench/results/cpu.json]

llama.cpp's tools are taken from the folder LLAMA_CPP_BIN, vLLM servers from VLLM_URL (see vllm.py); without them only our own
columns are filled. Every measurement is a process of its own. `--into` adds to a report that is there, so that files can be
measured in several sittings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import figures, llama_cpp, machine, plot, starts, table, vllm
from bench.figures import Samples, Work
from bench.llama_cpp import PeerError
from bench.make_model import SHAPES, make
from bench.quiet import Quiet
from ollamapy.lifecycle.devices import physical_cores
from tests import real_models
from tests.conftest import golden

RESULTS = Path(__file__).parent / "results"
OURS = "ollamapy"
GOLDEN = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}
Say = Callable[[str], None]
RANDOM = {f"llama-1b-{mix.lower()}": mix for mix in ("Q4_K_M", "Q6_K", "Q8_0", "Q4_0")}
MODELS = (*GOLDEN, *RANDOM)


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


def peers_of(name: str, path: Path) -> dict[str, Callable[[Work], Samples]]:
    """What the environment names: llama.cpp's folder of tools, vLLM servers of this model."""
    found: dict[str, Callable[[Work], Samples]] = {}
    folder, url = os.environ.get("LLAMA_CPP_BIN"), vllm.addresses().get(name)
    if folder:
        found[llama_cpp.NAME] = lambda work: llama_cpp.measure(Path(folder), path, work)
    if url:
        found[vllm.NAME] = lambda work: vllm.measure(url, work) if work.threads > 1 else {}
    return found


class Sitting:
    """One model's measurements. A peer that fails is left out from then on, and the report says why."""

    def __init__(self, name: str, path: Path, quiet: Quiet, say: Say) -> None:
        self.name, self.path, self.quiet, self.say = name, path, quiet, say
        self.peers = peers_of(name, path)
        self.samples: dict[str, list[Samples]] = {OURS: []}
        self.starts: dict[str, starts.Start] = {}
        self.failures: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def turn(self, engine: str, work: Work) -> None:
        start = time.perf_counter()
        if engine == OURS:
            wants_kl = GOLDEN.get(self.name, "") if not self.facts else ""
            found = self.quiet.run(lambda: run_ours(self.path, work, wants_kl))
            self.samples[OURS].append(found.pop("samples"))
            self.facts = {**found, **self.facts}
        else:
            into = self.samples.setdefault(engine, [])
            self.ask(engine, lambda: into.append(self.quiet.run(lambda: self.peers[engine](work))))
        self.say(f"  {self.name}, {engine}, {', '.join(work.columns)}: {time.perf_counter() - start:.0f} s")

    def ask(self, engine: str, run: Callable[[], None]) -> None:
        try:
            if engine not in self.failures:
                run()
        except PeerError as problem:
            self.failures[engine] = str(problem)
            self.say(f"  {self.name}, {engine} is left out: {problem}")

    def start(self, threads: int) -> None:
        """Loads to the first token, and memory, of ours and llama.cpp."""
        self.starts[OURS] = self.quiet.run(lambda: starts.ours(self.path, threads))
        folder = os.environ.get("LLAMA_CPP_BIN")
        if folder:
            run = lambda: starts.llama(Path(folder), self.path, threads)  # noqa: E731
            self.ask(llama_cpp.NAME, lambda: self.starts.update({llama_cpp.NAME: self.quiet.run(run)}))

    def row(self) -> dict[str, Any]:
        engines = {engine: figures.merge(samples) for engine, samples in self.samples.items()}
        row = {"name": self.name, "file": self.path.name, **self.facts, "engines": engines, "starts": self.starts}
        if "kl" in row:
            row["kl"] = {OURS: row["kl"], llama_cpp.NAME: golden(GOLDEN[self.name])[llama_cpp.NAME]["mean_kl"]}
        return {**row, "failures": self.failures, "commit": machine.commit(), "others_cpu": max(self.quiet.others)}


def measure(name: str, path: Path, works: list[Work], options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """One row of the report. `options.turns`: who measures when, A is ours and B the peers."""
    before = machine.load_average()
    sitting = Sitting(name, path, Quiet(options.patience), say)
    for turn in options.turns:
        for work in works:
            for engine in [OURS] if turn == "A" else sitting.peers:
                sitting.turn(engine, work)
    if not options.short:
        sitting.start(options.threads)
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
    parser.add_argument("--turns", default="ABA", help="A: ollamapy, B: peers")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, per model")
    parser.add_argument("--short", action="store_true", help="the real models, prefill and one sequence")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    parser.add_argument("--into", type=Path, help="report to write or to add to (default: results/cpu-TIME.json)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    names = list(GOLDEN) if options.short else options.models.split(",")
    unknown = set(names) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models {', '.join(sorted(unknown))} (known: {', '.join(MODELS)})")
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
