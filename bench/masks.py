"""What a grammar costs per token: finding out what may come next, and forbidding the rest in a row of logits.

    python -m bench.masks MODEL.gguf [MODEL.gguf ...] [--rounds 5]

Follows the tokens of JSON documents that fit a schema, with the vocabulary of each model; no weights are loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from ollamapy import ops
from ollamapy.engine.grammar import Grammar
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.sampler import constrain
from ollamapy.gguf.reader import GGUFFile
from ollamapy.lifecycle.worker import read_vocabulary
from ollamapy.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "emails": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["person", "company", "unknown"]},
        "notes": {"type": "string", "maxLength": 400},
    },
    "required": ["name", "age", "emails", "kind", "notes"],
    "additionalProperties": False,
}
NOTES = "Met her at the harbour in spring; she said the ship would leave at dawn, with or without us, and it did. "
DOCUMENT = {
    "name": "Ada Lovelace",
    "age": 36,
    "emails": ["ada@example.org", "a.l@example.com"],
    "kind": "person",
    "notes": NOTES,
}
NAMES = ("filling", "filling and applying", "accepting")


def grammar_text() -> str:
    """As the server makes it of a schema."""
    answer = {"name": "answer", "json_schema": SCHEMA}
    return json.dumps({"grammars": [{"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @answer'}, answer]})


def followed(grammar: Grammar, ids: list[int], logits: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each token: filling its mask, both filling and applying it, and going past it."""
    filling, both, accepting = [], [], []
    bits = np.zeros(grammar.num_words, dtype=np.int32)
    for id in ids:
        twin, row = grammar.copy(), logits.clone()  # the second filling of one place is remembered
        start = time.perf_counter()
        twin.allowed(bits)
        filled = time.perf_counter()
        constrain(row, [grammar])
        done = time.perf_counter()
        assert row[0, id] != -math.inf, "the document does not fit its schema"
        grammar.accept(id)
        accepting.append(time.perf_counter() - done)
        filling.append(filled - start)
        both.append(done - filled)
    return filling, both, accepting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ops.choose(torch.device("cpu"))
    num_threads = torch.get_num_threads()
    ops.set_threads(num_threads)
    print(f"{num_threads} threads; microseconds per token: mean, 99 of 100")
    for path in arguments.models:
        with GGUFFile.open(path) as file:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        grammars = Grammars(lambda path=path: read_vocabulary(str(path)))  # type: ignore[misc]
        ids = tokenizer.encode(json.dumps(DOCUMENT))
        logits = torch.randn(1, tokenizer.vocab_size)
        parts: list[list[float]] = [[], [], []]
        for _ in range(arguments.rounds):
            for part, seconds in zip(parts, followed(grammars.start(grammar_text()).result(), ids, logits), strict=True):
                part += seconds
        row = f"{path.name}: {tokenizer.vocab_size} tokens in the vocabulary, {len(ids)} followed"
        print(
            row,
            *(_shown(name, part) for name, part in zip(NAMES, parts, strict=True)),
            sep="; ",
        )


def _shown(name: str, seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{name} {statistics.fmean(seconds) * 1e6:.0f}, {ordered[len(ordered) * 99 // 100] * 1e6:.0f}"


if __name__ == "__main__":
    main()
