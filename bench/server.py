"""The API server alone: streamed tokens/s, its CPU time per token, latency per token, requests/s. Engines only count.

`python -m bench.server` starts a daemon with the engine of `bench.fake_engine` and drives it over HTTP from this process.
Prints a table and, last, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import fake_engine
from tests.daemon import Serving, free_port

MODEL = "count"
SECONDS = 4.0  # that a streaming case takes, about
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")


@dataclass(frozen=True, slots=True)
class Case:
    """`pace`: steps per second that the engine makes; 0: as fast as it goes."""

    name: str
    streams: int
    tokens: int
    pace: int = 0
    path: str = "/api/chat"


@dataclass(frozen=True, slots=True)
class Result:
    """CPU times are of the daemon's process alone, without its engine. Latency is from the engine's step to the bytes here."""

    case: Case
    seconds: float
    tokens_per_s: float
    daemon_us_per_token: float
    client_us_per_token: float
    tokens_per_line: float
    latency_ms_p50: float | None
    latency_ms_p99: float | None


def create(url: str, folder: Path, headers: Mapping[str, str]) -> None:
    """Gives a daemon that counts its one model."""
    fake_engine.write_model(folder / "count.gguf")
    content = (folder / "count.gguf").read_bytes()
    digest = f"sha256:{sha256(content).hexdigest()}"
    body = {"model": MODEL, "files": {"count.gguf": digest}, "stream": False}
    with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
        client.post(f"/api/blobs/{digest}", content=content).raise_for_status()
        client.post("/api/create", json=body).raise_for_status()


@contextmanager
def daemon(root: Path) -> Iterator[Serving]:
    """The daemon of the source tree `root`, with the counting engine and its one model loaded, in a store of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        own = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(folder / "models"), "OLLAMA_KEEP_ALIVE": "-1"}
        command = (sys.executable, str(root / "bench" / "fake_engine.py"), "serve")
        made = Serving(folder / "log", {**os.environ, **own}, port, command, root)
        try:
            create(made.url, folder, {})
            httpx.post(f"{made.url}/api/generate", json={"model": MODEL}, timeout=30, trust_env=False).raise_for_status()
            yield made
        finally:
            made.stop()


def cpu_seconds(daemon: Serving) -> float:
    times = psutil.Process(daemon.process.pid).cpu_times()
    return float(times.user + times.system)


def request(case: Case, stream: bool = True) -> bytes:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "stream": stream}
    if case.path.startswith("/v1/"):
        body |= {"max_tokens": case.tokens, "seed": case.pace}
    else:
        body["options"] = {"num_predict": case.tokens, "seed": case.pace}
    content = json.dumps(body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def stream(daemon: Serving, case: Case) -> Result:
    """All streams begin together. Every text is compared with what the engine said."""
    arrivals: dict[socket.socket, list[tuple[float, bytes]]] = {}
    content = request(case)
    with selectors.DefaultSelector() as selector:
        for _ in range(case.streams):
            sock = socket.create_connection(("127.0.0.1", daemon.port))
            selector.register(sock, selectors.EVENT_READ)
            arrivals[sock] = []
        cpu, own, start = cpu_seconds(daemon), time.process_time(), time.monotonic()
        for sock in arrivals:
            sock.sendall(content)
        left = case.streams
        while left:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(1 << 18)
                arrivals[key.fileobj].append((time.monotonic(), data))
                if not data or data.endswith(b"0\r\n\r\n"):
                    selector.unregister(key.fileobj)
                    left -= 1
        seconds = time.monotonic() - start
        used, own_used = cpu_seconds(daemon) - cpu, time.process_time() - own
    lines = 0
    for sock, chunks in arrivals.items():
        sock.close()
        said, count = answer(b"".join(data for _, data in chunks))
        assert said == fake_engine.text(case.tokens), f"{len(said)} characters that are not those of the engine"
        lines += count
    total = case.streams * case.tokens
    late = sorted(delay(case, [at for chunks in arrivals.values() for at, _ in chunks[2:-1]]))
    return Result(
        case,
        seconds=round(seconds, 3),
        tokens_per_s=round(total / seconds),
        daemon_us_per_token=round(used / total * 1e6, 1),
        client_us_per_token=round(own_used / total * 1e6, 1),
        tokens_per_line=round(total / lines, 2),
        latency_ms_p50=round(statistics.median(late), 2) if late else None,
        latency_ms_p99=round(late[len(late) * 99 // 100], 2) if late else None,
    )


def delay(case: Case, times: list[float]) -> list[float]:
    """Milliseconds since the engine's step, whose times are multiples of the pace's interval."""
    return [at % (1 / case.pace) * 1e3 for at in times] if case.pace else []


def answer(raw: bytes) -> tuple[str, int]:
    """The text of a streamed HTTP answer, and how many of its lines have text."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), raw[:500]
    body, at = [], 0
    while match := _CHUNK.match(rest, at):
        size = int(match[1], 16)
        body.append(rest[match.end() : match.end() + size])
        at = match.end() + size + 2
    texts = []
    for line in b"".join(body).split(b"\n"):
        line = line.removeprefix(b"data: ")
        if line and line != b"[DONE]":
            said = json.loads(line)
            message = said["message"] if "message" in said else said["choices"][0]["delta"]
            texts.append(message.get("content") or "")
    return "".join(texts), sum(1 for text in texts if text)


def requests_per_second(daemon: Serving, connections: int, seconds: float) -> dict[str, float]:
    """Whole answers of one token, one request after the other on each connection."""
    content = request(Case("", connections, 1), stream=False)
    done, cpu = 0, cpu_seconds(daemon)
    with selectors.DefaultSelector() as selector:
        socks = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(connections)]
        start = time.monotonic()
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ, b"")
            sock.sendall(content)
        while time.monotonic() - start < seconds:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                received = key.data + key.fileobj.recv(1 << 16)
                assert received.startswith(b"HTTP/1.1 200"), received
                if whole := received.endswith(b"}"):
                    done += 1
                    key.fileobj.sendall(content)
                selector.modify(key.fileobj, selectors.EVENT_READ, b"" if whole else received)
        elapsed = time.monotonic() - start
        used = cpu_seconds(daemon) - cpu
        for sock in socks:
            sock.close()
    return {"connections": connections, "per_s": round(done / elapsed), "daemon_us": round(used / done * 1e6)}


def cases(seconds: float) -> list[Case]:
    return [
        Case("1 stream", 1, int(6000 * seconds)),
        Case("16 streams", 16, int(800 * seconds)),
        Case("64 streams", 64, int(200 * seconds)),
        Case("64 streams, /v1", 64, int(200 * seconds), path="/v1/chat/completions"),
        Case("64 streams, 400 steps/s", 64, int(400 * seconds), 400),
        Case("32 streams, 20 steps/s", 32, int(20 * seconds), 20),
        Case("32 streams, 20 steps/s, /v1", 32, int(20 * seconds), 20, "/v1/chat/completions"),
        Case("32 streams, 100 steps/s", 32, int(100 * seconds), 100),
        Case("1 stream, 100 steps/s", 1, int(100 * seconds), 100),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each case, about")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="source tree of the daemon to measure")
    args = parser.parse_args()
    print(f"{'case':28} {'tokens/s':>9} {'daemon us':>9} {'client us':>9} {'tok/line':>8} {'p50 ms':>7} {'p99 ms':>7}")
    results = []
    with daemon(args.root.resolve()) as serving:
        stream(serving, Case("warm up", 16, 200))
        for case in cases(args.seconds):
            if args.only in case.name:
                one = stream(serving, case)
                results.append(one)
                print(
                    f"{case.name:28} {one.tokens_per_s:9.0f} {one.daemon_us_per_token:9.1f} {one.client_us_per_token:9.1f} "
                    f"{one.tokens_per_line:8.2f} {one.latency_ms_p50 or 0:7.2f} {one.latency_ms_p99 or 0:7.2f}",
                    flush=True,
                )
        whole = [requests_per_second(serving, connections, args.seconds / 2) for connections in (1, 16)]
    for row in whole:
        print(
            f"{row['connections']} connections, not streamed: {row['per_s']} requests/s, {row['daemon_us']} us of daemon each"
        )
    print(json.dumps({"streams": [asdict(one) for one in results], "requests": whole}))


if __name__ == "__main__":
    main()
