"""From an engine's start to its first token, the file being in the page cache, and the memory it holds then.

`python -m bench.starts MODEL...`: our daemon started for it, our daemon being there, and llama-server, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil

from bench import llama_cpp, servers
from bench.servers import Running
from tests import daemon

Start = dict[str, float]
"""first_token_s; memory_bytes: of all its processes, pages that several share counted in parts."""


def ours(path: Path, threads: int) -> Start:
    """The daemon is there; the engine is started by a request and answers it."""
    with tempfile.TemporaryDirectory() as folder:
        return _start(lambda: servers.ours(Path(folder) / "home", path, threads))


def llama(tools: Path, path: Path, threads: int) -> Start:
    """Raises PeerError when the server does not come up."""
    if not (tools / "llama-server").exists():
        raise llama_cpp.PeerError(f"{tools / 'llama-server'}: No such file or directory")
    return _start(lambda: servers.llama(tools, path, threads, 1))


def _start(server: Callable[[], AbstractContextManager[Running]]) -> Start:
    with server() as running:
        return {"first_token_s": running.first_token_s, "memory_bytes": memory(running.pid)}


def memory(pid: int) -> int:
    """Bytes of a process and its children: each page divided by the processes that have it."""
    top = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [top, *top.children(recursive=True)])


def serve_and_ask(path: Path, threads: int) -> float:
    """Seconds from the start of `ollamapy serve`, which has the model in its store, to the answer of a request made at once."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with servers.ours(home, path, threads):
            pass
        servers.use_memory(path)
        own = daemon.environment(home, daemon.free_port(), OLLAMA_CONTEXT_LENGTH=str(servers.CONTEXT))
        start = time.perf_counter()
        with open(own.log, "wb") as log:
            process = subprocess.Popen([*daemon.COMMAND, "serve"], env=own.environment, stdout=log, stderr=log)
        try:
            _ask(f"http://{own.host}/api/generate", process)
            return time.perf_counter() - start
        finally:
            process.terminate()
            process.wait(20)


def _ask(url: str, process: subprocess.Popen[bytes]) -> None:
    """One token, as soon as somebody listens."""
    request = {"model": servers.NAME, "prompt": "Hello", "stream": False, "options": {"num_predict": 1, "temperature": 0}}
    with httpx.Client(timeout=servers.START_SECONDS, trust_env=False) as client:
        while process.poll() is None:
            try:
                client.post(url, json=request).raise_for_status()
                return
            except httpx.ConnectError:
                time.sleep(0.005)
    raise RuntimeError(f"the server ended with status {process.poll()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    tools = os.environ.get("LLAMA_CPP_BIN", "")
    for path in args.models:
        taken: dict[str, list[float]] = {}
        for _ in range(args.turns):
            taken.setdefault("serve and ask", []).append(serve_and_ask(path, args.threads))
            taken.setdefault("ask", []).append(ours(path, args.threads)["first_token_s"])
            if tools:
                taken.setdefault("llama-server", []).append(llama(Path(tools), path, args.threads)["first_token_s"])
        for name, seconds in taken.items():
            print(f"{path.name} {name}: {statistics.median(seconds):.2f} s of {sorted(round(each, 2) for each in seconds)}")


if __name__ == "__main__":
    main()
