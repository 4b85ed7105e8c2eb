"""Servers under measurement, started for it and stopped after it: our daemon in a home of its own, llama-server, vLLM."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

from bench.llama_cpp import PeerError
from ollamapy.gguf.reader import GGUFFile
from tests import daemon

NAME = "bench"
CONTEXT = 2048  # tokens of each user
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"  # where a file has no chat template, for all servers
PLAIN_GO = 'TEMPLATE """{{ range .Messages }}{{ .Content }}\n{{ end }}"""\n'  # the same
START_SECONDS = 600.0  # vLLM compiles for a minute or two, longer where others compute


@dataclass(frozen=True, slots=True)
class Running:
    """`first_token_s`: of the others from their start, of our daemon, which is there, from a request that loads the model."""

    url: str
    model: str
    first_token_s: float
    pid: int
    daemon: daemon.Daemon | None = None

    def eval_rate(self) -> float:
        """Tokens/s that `run --verbose` reports: the median of three single-user answers."""
        assert self.daemon is not None
        rates = []
        for number in range(3):
            done = self.daemon.cli("run", self.model, "--verbose", f"Write a long story about a journey, version {number}.")
            found = re.search(r"^eval rate:\s+([0-9.]+)", done.stdout + done.stderr, re.MULTILINE)
            if found is None:
                raise RuntimeError(f"no eval rate in: {done.stderr[-500:]}")
            rates.append(float(found.group(1)))
        return statistics.median(rates)


@contextmanager
def ours(folder: Path, model: Path, threads: int, **variables: str) -> Iterator[Running]:
    """A daemon that has the model created and loaded, with the thread count as one of its parameters."""
    own = {"OLLAMA_CONTEXT_LENGTH": str(CONTEXT), "OLLAMA_KEEP_ALIVE": "-1", **variables}
    with daemon.running(folder, **own) as running:
        modelfile = folder / "Modelfile"
        plain = PLAIN_GO if chat_template(model) == PLAIN else ""
        modelfile.write_text(f"FROM {model}\n{plain}PARAMETER num_thread {threads}\nPARAMETER num_predict 128\n")
        running.ok("create", NAME, "-f", str(modelfile))
        url = f"http://{running.host}"
        options = {"num_predict": 1, "temperature": 0}
        request = {"model": NAME, "prompt": "Hello", "stream": False, "options": options}
        assert running.process is not None
        wait_for_log(running.log, "engines can start")
        use_memory(model)
        yield Running(url, NAME, timed_answer(f"{url}/api/generate", request), running.process.pid, running)


@contextmanager
def llama(folder: Path, model: Path, threads: int, users: int) -> Iterator[Running]:
    """llama-server with a slot for each user."""
    port = daemon.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(folder / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-fa", "on"]
    command += ["-np", str(users), "-c", str(users * CONTEXT), "-t", str(threads), "-tb", str(threads), "-ngl", "0"]
    if chat_template(model) == PLAIN:
        command += ["--jinja", "--chat-template", PLAIN]
    use_memory(model)
    with started(command, url, model.name) as running:
        yield running


@contextmanager
def vllm(program: Path, folder: Path, model: Path, threads: int) -> Iterator[Running]:
    """vLLM's CPU build on a transformers folder of the same weights in bf16; the chat template is that of the GGUF."""
    port = daemon.free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "chat.jinja"
        found = chat_template(model)
        template.write_text("{{ bos_token }}" + PLAIN if found == PLAIN else found)  # the others add it by themselves
        command = [
            str(program),
            "serve",
            str(folder),
            "--served-model-name",
            NAME,
            "--dtype",
            "bfloat16",
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(port), "--max-model-len", str(CONTEXT), "--chat-template", str(template)]
        variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
        variables |= {"OMP_NUM_THREADS": str(threads)}
        with started(command, url, NAME, variables) as running:
            yield running


def use_memory(model: Path) -> None:
    """As much as an engine will take, for a moment before its start is timed: a virtual machine that gives free memory back to
    its host waits 2 to 14 us for each page that it gets again, seconds for a GB, and these are no engine's."""
    np.ones(2 * model.stat().st_size, dtype=np.uint8)


def chat_template(model: Path) -> str:
    with GGUFFile.open(model) as file:
        found: str = file.metadata.get("tokenizer.chat_template", PLAIN)
    return found


def vllm_folders() -> dict[str, Path]:
    """Model -> transformers folder, of VLLM_MODELS."""
    pairs = [pair.partition("=") for pair in os.environ.get("VLLM_MODELS", "").split(",") if "=" in pair]
    return {name.strip(): Path(folder.strip()) for name, _, folder in pairs}


@contextmanager
def started(command: list[str], url: str, model: str, variables: dict[str, str] | None = None) -> Iterator[Running]:
    """A peer's process from its start to its end, once it has answered one token. In a group of its own: vLLM has children."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, **(variables or {})}
        try:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        except OSError as problem:
            raise PeerError(f"{command[0]}: {problem.strerror}") from None
        try:
            wait_until_healthy(url, process, said)
            request = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
            timed_answer(f"{url}/v1/completions", request)
            yield Running(url, model, time.perf_counter() - start, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_log(log: Path, text: str) -> None:
    """A daemon reads its libraries for a second or two after it has begun to answer."""
    deadline = time.monotonic() + START_SECONDS
    while text not in log.read_text():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{text!r} does not come into {log}")
        time.sleep(0.05)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    said.seek(0)
    tail = said.read().decode(errors="replace").splitlines()[-5:]
    raise PeerError(f"{process.args} did not come up (status {process.poll()}): {' / '.join(tail)}")


def timed_answer(url: str, request: dict[str, Any]) -> float:
    """Seconds until the whole answer of one token is there."""
    start = time.perf_counter()
    httpx.post(url, json=request, timeout=START_SECONDS, trust_env=False).raise_for_status()
    return time.perf_counter() - start
