"""The daemon as a process: starting, stopping, and the death of an engine under it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.daemon import ROOT, SERVE
from tests.server.daemon import Daemon, connect, read_head, request_bytes, running

MODEL = "smollm2"


def test_it_answers_soon(tmp_path: Path) -> None:
    """After some 0.3 s of work where importing torch alone takes one: it is another process that does that."""
    with running(tmp_path / "models", tmp_path / "log") as daemon:
        assert daemon.work_to_answer <= 0.8


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, how: signal.Signals) -> None:
    with running(tmp_path / "models", tmp_path / "log") as daemon:
        assert daemon.stop(how) == 0
    assert "Traceback" not in daemon.log.read_text()
    assert "OLLAMA_KEEP_ALIVE" in daemon.log.read_text()


def test_a_port_in_use_is_an_error(bare_daemon: Daemon) -> None:
    environment = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{bare_daemon.port}"}
    done = subprocess.run(SERVE, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=30)
    assert done.returncode == 1
    assert done.stderr.endswith(f"Error: listen tcp 127.0.0.1:{bare_daemon.port}: bind: address already in use\n")


def test_a_missing_store_is_empty_and_a_host_that_is_none_an_error(tmp_path: Path) -> None:
    with running(tmp_path / "nothing" / "here", tmp_path / "log") as daemon:
        assert daemon.get("/api/tags") == {"models": []} and daemon.get("/v1/models") == {"object": "list", "data": []}
    environment = {**os.environ, "OLLAMA_HOST": "no.such.host.invalid:1"}
    done = subprocess.run(SERVE, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 1 and "Error: listen tcp no.such.host.invalid:1: " in done.stderr


def test_kill_minus_nine_of_the_engine_under_eight_streams(daemon: Daemon) -> None:
    """Each stream ends with an error line, the daemon answers throughout, the next request works."""
    body = {"model": MODEL, "prompt": "Tell a long story.", "options": {"num_predict": 1000}}
    assert daemon.post("/api/generate", {"model": MODEL, "prompt": ""}).status_code == 200
    ends: list[str] = []
    started = threading.Barrier(9)

    def stream(native: bool) -> None:
        path = "/api/generate" if native else "/v1/completions"
        sent = {**body, "stream": True} if native else {**{k: body[k] for k in ("model", "prompt")}, "stream": True}
        with httpx.stream("POST", daemon.url + path, json=sent, timeout=60, trust_env=False) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert answer.status_code == 200 and "error" not in next(lines)
            started.wait(60)
            *_, last = lines
        ends.append(json.loads(last.removeprefix("data: "))["error"] if native else json.loads(last[6:])["error"]["message"])

    latencies: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            begin = time.monotonic()
            assert daemon.answers()
            latencies.append(time.monotonic() - begin)
            time.sleep(0.01)

    threads = [threading.Thread(target=stream, args=(n % 4 != 0,)) for n in range(8)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    started.wait(60)
    os.kill(daemon.engine()["pid"], signal.SIGKILL)
    killed = time.monotonic()
    for thread in threads[:8]:
        thread.join(30)
    seen = time.monotonic() - killed
    time.sleep(0.5)  # what comes after the death is watched, too
    over.set()
    threads[8].join()
    assert len(ends) == 8 and all(end.startswith("model runner has unexpectedly stopped") for end in ends)
    assert seen < 1.0
    assert len(latencies) > 5 and max(latencies) < 1.0
    again = daemon.post("/api/generate", {"model": MODEL, "prompt": "Hi", "stream": False, "options": {"num_predict": 2}})
    assert again.status_code == 200 and again.json()["eval_count"] == 2


def test_an_engine_that_dies_before_the_first_line_is_an_ordinary_error(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        daemon.post("/api/generate", {"model": MODEL, "prompt": ""})
        sock.sendall(
            request_bytes("POST", "/api/chat", {"model": MODEL, "messages": [{"role": "user", "content": "word " * 3000}]})
        )
        while daemon.stats()["num_running"] == 0:
            time.sleep(0.005)
        os.kill(daemon.engine()["pid"], signal.SIGKILL)
        status, headers, _ = read_head(sock)
    assert status == 500 and headers["content-type"].startswith("application/json")


def test_a_full_queue_is_refused_at_once(daemon: Daemon, tmp_path: Path) -> None:
    """Two sequences run, one request waits; the fourth is refused although the model is loaded."""
    models = daemon.log.parent / "models"
    body = {"model": MODEL, "prompt": "x", "options": {"num_predict": 500, "num_batch": 2}}
    with running(models, tmp_path / "log", OLLAMA_MAX_QUEUE="1") as other:
        assert other.post("/api/generate", {**body, "prompt": ""}).status_code == 200
        socks = []
        for count in range(1, 4):
            socks.append(connect(other))
            socks[-1].sendall(request_bytes("POST", "/api/generate", body))
            while other.engine()["requests"] < count:
                time.sleep(0.01)
        begin = time.monotonic()
        refused = other.post("/api/generate", body)
        assert time.monotonic() - begin < 1.0
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"] == "server busy, please try again.  maximum pending requests exceeded"
        for sock in socks:
            sock.close()
        other.seconds_until_idle()


@pytest.mark.slow
def test_signal_with_streams_running(daemon: Daemon, tmp_path: Path) -> None:
    """The first signal lets them end for ten seconds; the second ends them at once."""
    models = Path(daemon.log).parent / "models"
    for signals, limit in ((1, 25.0), (2, 5.0)):
        with running(models, tmp_path / f"log{signals}") as other, connect(other) as sock:
            sock.sendall(
                request_bytes("POST", "/api/generate", {"model": MODEL, "prompt": "x", "options": {"num_predict": 4000}})
            )
            assert read_head(sock)[0] == 200
            begin = time.monotonic()
            for _ in range(signals):
                other.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert other.process.wait(40) == 0
            assert time.monotonic() - begin < limit
