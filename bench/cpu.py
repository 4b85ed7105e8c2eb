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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import figures, llama_cpp, machine, plot, table, vllm
from bench.figures import Samples, Work
from bench.make_model import SHAPES, make
from bench.quiet import Quiet
from ollamapy.lifecycle.devices import physical_cores
from tests import real_models
from tests.conftest import golden

RESULTS = Path(__file__).parent / "results"
OURS = "ollamapy"
GOLDEN = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}
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


def measure(name: str, path: Path, works: list[Work], turns: str, quiet: Quiet) -> dict[str, Any]:
    """One row of the report. `turns`: who measures when, A is ours and B the peers."""
    before, ours = machine.load_average(), []
    theirs: dict[str, list[Samples]] = {}
    peers = peers_of(name, path)
    facts: dict[str, Any] = {}
    loads: list[float] = []

    def our_turn(work: Work, first: bool) -> None:
        found = quiet.run(lambda: run_ours(path, work, GOLDEN.get(name, "") if first else ""))
        ours.append(found.pop("samples"))
        loads.append(found.pop("load_seconds"))
        facts.update(found)

    for number, turn in enumerate(turns):
        for index, work in enumerate(works):
            if turn == "A":
                our_turn(work, first=number == index == 0)
            else:
                for engine, run in peers.items():
                    theirs.setdefault(engine, []).append(quiet.run(lambda run=run, work=work: run(work)))  # type: ignore[misc]
    engines: dict[str, Samples] = {OURS: figures.merge(ours)}
    engines |= {engine: figures.merge(samples) for engine, samples in theirs.items()}
    row = {"name": name, "file": path.name, **facts, "load_seconds": statistics.median(loads), "engines": engines}
    if "kl" in row:
        row["kl"] = {OURS: row["kl"], llama_cpp.NAME: golden(GOLDEN[name])[llama_cpp.NAME]["mean_kl"]}
    row["commit"], row["load_average"] = machine.commit(), [before, machine.load_average()]
    row["others_cpu"] = max(quiet.others)
    return row


def report(names: list[str], works: list[Work], options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures and returns what is saved. Models that a report at `options.into` has already are kept."""
    if not os.environ.get("LLAMA_CPP_BIN"):
        say("LLAMA_CPP_BIN is not set: nothing to compare with")
    old: dict[str, Any] = json.loads(options.into.read_text()) if options.into and options.into.exists() else {}
    limits = machine.limits(options.threads)
    if not limits:
        say("no C compiler for this CPU's probes: fractions of its limits are left out")
    limits = {key: max(value, old.get("limits", {}).get(key, 0.0)) for key, value in limits.items()}
    done = {row["name"]: row for row in old.get("models", [])}
    for name in names:
        path, start = model_path(name, options.folder), time.perf_counter()
        done[name] = measure(name, path, works, options.turns, Quiet(options.patience))
        seconds, others = time.perf_counter() - start, done[name]["others_cpu"]
        say(f"{name}: {seconds:.0f} s, load average {done[name]['load_average']}, others used up to {others:.1%} of the cores")
    columns = list(dict.fromkeys([*old.get("columns", []), *(column for work in works for column in work.columns)]))
    order = [name for name in MODELS if name in done]
    rows = [done[name] for name in order]
    return {"machine": machine.facts(), "threads": options.threads, "limits": limits, "columns": columns, "models": rows}


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
    alone = Work(1, options.repeats, prefill=False, batches=())
    works = [replace(work, batches=())]
    if not options.short:
        works += [replace(work, prefill=False, single=False)] + [alone] * (options.threads > 1)
    try:
        found = report(names, works, options, lambda text: print(text, file=sys.stderr, flush=True))
    except llama_cpp.PeerError as problem:
        raise SystemExit(str(problem)) from None
    print(table.render(found))
    if not options.short or options.into:
        target = options.into or RESULTS / f"cpu-{found['machine']['time'].replace(':', '')[:15]}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")
        print(f"saved {target}; {plot.draw(found, target.with_suffix('.png'))}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
