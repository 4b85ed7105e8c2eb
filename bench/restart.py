"""The first token of a long system prompt: new, again, after a restart without and with the prefix cache on disk.

    python -m bench.restart --file smollm2 --prompt 4000

Our own daemon over HTTP, in a home and with a cache folder of its own. After each restart another prompt loads the model. ms to
the first piece of the answer, medians over the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.cpu import MODELS, model_path
from bench.servers import PLAIN, PLAIN_GO, chat_template
from bench.stalls import long_prompt
from bench.table import align
from ollamapy.lifecycle.devices import physical_cores
from tests import daemon

CONTEXT = 8192
ON = str(2 << 30)  # bytes on disk, as shipped
SETTLED = 1.0  # seconds without a new file: all blocks are written
CASES = ("cold", "again", "restarted, files off", "restarted, files on")


class Home:
    """One model's daemon, started as often as wanted on the same store and cache."""

    def __init__(self, folder: Path, path: Path, threads: int) -> None:
        self._folder, self._cache = folder, folder / "cache"
        self._modelfile = folder / "Modelfile"
        plain = PLAIN_GO if chat_template(path) == PLAIN else ""
        self._modelfile.write_text(f"FROM {path}\n{plain}PARAMETER num_thread {threads}\n")

    def ask(self, systems: list[str], cache_bytes: str) -> list[dict[str, Any]]:
        """Starts, loads the model with another prompt, asks with each system prompt, waits for the files, ends."""
        variables = {"OLLAMAPY_PREFIX_CACHE_BYTES": cache_bytes, "XDG_CACHE_HOME": str(self._cache)}
        with daemon.running(self._folder, OLLAMA_CONTEXT_LENGTH=str(CONTEXT), **variables) as running:
            running.ok("create", "model", "-f", str(self._modelfile))
            with httpx.Client(base_url=f"http://{running.host}", timeout=600, trust_env=False) as client:
                first_piece(client, "You are short.")
                found = [first_piece(client, system) for system in systems]
            self._settle()
        return found

    def _settle(self) -> None:
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < SETTLED:
            count = sum(1 for file in self._cache.rglob("*") if file.is_file())
            if count != seen:
                seen, since = count, time.monotonic()
            time.sleep(0.05)


def first_piece(client: httpx.Client, system: str) -> dict[str, Any]:
    """ms until it came; tokens of the prompt, and of them those not computed."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    body = {"model": "model", "messages": messages, "options": {"num_predict": 2, "temperature": 0}}
    start, came, last = time.perf_counter(), 0.0, ""
    with client.stream("POST", "/api/chat", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            came, last = came or time.perf_counter() - start, line or last
    told = json.loads(last)
    return {"ms": came * 1e3, "tokens": told["prompt_eval_count"], "cached": told.get("prompt_eval_cached_count", 0)}


def measured(home: Home, prompt: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each round has a system prompt of its own, so that its first time is cold."""
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for number in range(rounds):
        system = f"Case {number}. {long_prompt(prompt)}"
        answers = home.ask([system, system], ON)
        answers += home.ask([system], "0") + home.ask([system], ON)
        for case, answer in zip(CASES, answers, strict=True):
            found[case].append(answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="smollm2", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--prompt", type=int, default=4000, help="words of the system prompt, each a token or two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    args = parser.parse_args()
    path = model_path(args.file, args.folder)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Home(Path(folder), path, args.threads), args.prompt, args.rounds)
    rows = [["", "tokens", "of them cached", "first token ms"]]
    for case, answers in found.items():
        middle = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
        rows.append([case, f"{middle['tokens']:.0f}", f"{middle['cached']:.0f}", f"{middle['ms']:.0f}"])
    print("\n".join(align(rows)))
    print(json.dumps({"file": args.file, **found}))


if __name__ == "__main__":
    main()
