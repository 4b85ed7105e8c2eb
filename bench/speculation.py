"""Tokens per second with and without speculation, greedy, in the engine's own loop: texts that repeat their prompt, and not.

    python -m bench.speculation MODEL.gguf [--batches 1 4 16] [--tokens 128] [--rounds 3] [--draft DRAFT.gguf]

Sides take turns; the best round of each counts. Also checks that both give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from ollamapy import ops
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Plan, SamplingParams, Step
from ollamapy.gguf.reader import GGUFFile
from ollamapy.lifecycle.devices import physical_cores
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from ollamapy.tokenizer import Tokenizer

NAMES = ["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]
PEOPLE = [{"name": name, "age": 30 + place, "city": "Paris", "active": True} for place, name in enumerate(NAMES)]
CODE = """def total(prices):
    result = 0
    for price in prices:
        result = result + price
    return result


def mean(prices):
    return total(prices) / len(prices)
"""
REPEATING = [
    "A list:\n" + json.dumps(PEOPLE, indent=1) + "\nThe same list again:\n" + json.dumps(PEOPLE[:2], indent=1)[:-2],
    f"The code:\n{CODE}\nThe same code, with `prices` renamed to `costs`:\ndef total(costs):\n    result = 0\n",
    'He said: "The ship left the harbour at dawn with forty men, and nobody saw it again until the spring came." '
    'As quoted: "The ship left the harbour',
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3,",
]
OTHER = [
    "Once upon a time, in a village by the sea, there lived",
    "The three most important inventions of the last century were",
    "Dear Sir or Madam, I am writing to you because",
    "Photosynthesis is the process by which",
]


def generate(engine: Engine, prompts: list[list[int]], tokens: int, mode: str) -> tuple[float, list[list[int]]]:
    """Tokens per second while as many generate at once as the engine runs, and what was generated. The end, when some have
    no successor, is left out: guesses end some answers early, and what is left fills a step less."""
    found: list[list[int]] = [[] for _ in prompts]
    done, seconds = 0, 0.0
    for place, ids in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, speculation=mode, seed=0)  # type: ignore[arg-type]
        engine.add(place, ids, params)
    while engine.has_work:
        start = time.perf_counter()
        outputs = [output for event in engine.step() if isinstance(event, Step) for output in event.outputs]
        if len(outputs) == engine.plan.max_num_seqs:
            seconds += time.perf_counter() - start
            done += sum(len(output.token_ids) for output in outputs)
        for output in outputs:
            found[output.request_id] += output.token_ids
    return done / seconds, found


def load(path: Path) -> tuple[Decoder, Tokenizer]:
    with GGUFFile.open(path) as file:
        return load_model(file, torch.device("cpu")), Tokenizer.from_gguf(file.metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--costs", action="store_true", help="show what steps took, by their rows")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    draft = load(options.draft)[0] if options.draft else None
    ops.set_threads(physical_cores())
    for title, texts in (("repeating", REPEATING), ("other", OTHER)):
        prompts = [tokenizer.encode(text) for text in texts]
        for batch in options.batches:
            compare(title, batch, (model, draft), [prompts[place % 4] for place in range(max(4, 2 * batch))], options)


def compare(title: str, batch: int, models: tuple[Decoder, Decoder | None], prompts: list[list[int]], options: Any) -> None:
    """Prompts come from the prefix cache: what is timed is decoding, with `batch` sequences at a time."""
    modes = ("off", "auto") if models[1] is None else ("off", "ngram", "draft", "auto")
    plan = Plan("", num_blocks=2048, num_draft_blocks=2048, context_length=1024, max_num_seqs=batch)
    engine = Engine(models[0], plan, draft_model=models[1])
    answers = generate(engine, prompts, options.tokens, "off")[1]
    best = dict.fromkeys(modes, 0.0)
    guesses: dict[str, str] = {}
    for _ in range(options.rounds):
        for mode in modes:
            before = engine.stats()
            speed, found = generate(engine, prompts, options.tokens, mode)
            assert found == answers, "speculation changed an answer"
            best[mode] = max(best[mode], speed)
            after = engine.stats()
            accepted = after.num_accepted_tokens - before.num_accepted_tokens
            guesses[mode] = f"{accepted} of {after.num_draft_tokens - before.num_draft_tokens} guesses came true"
    for mode in modes[1:]:
        speeds = f"off {best['off']:7.1f} tok/s  {mode:>5} {best[mode]:7.1f}"
        print(f"{title:<10} batch {batch:>2}  {speeds}  {best[mode] / best['off']:5.2f}x  {guesses[mode]}", flush=True)
    if options.costs:
        cost = engine.speculation.cost
        print("  ms by rows:", {rows: round(1e3 * seconds, 2) for rows, (seconds, _) in sorted(cost._measured.items())})


if __name__ == "__main__":
    main()
