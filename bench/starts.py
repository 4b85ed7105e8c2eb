"""From an engine's start to its first token, the file being in the page cache, and the memory it holds then."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil

from bench import llama_cpp, servers
from bench.servers import Running

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
