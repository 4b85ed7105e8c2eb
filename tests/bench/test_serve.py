"""The load generator on a real daemon and on a server that misbehaves; its sums, tables and workloads on made-up figures."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import load, serve, serve_plot, servers
from bench.load import Stream, Target
from bench.serve import Round
from bench.workloads import WORKLOADS, Chat


def test_summary_of_streams() -> None:
    first = Stream(sent=0.0, arrivals=[0.1, 0.2, 0.3], tokens=3, wanted=5, prompt_tokens=20)
    second = Stream(sent=0.0, arrivals=[0.3, 0.4, 0.6], tokens=5, wanted=5, prompt_tokens=22)
    found = load.summary([first, second, Stream(sent=0.0, error="503", tokens=99)], seconds=2.0)
    assert found["tokens_per_s"] == 4.0 and found["chats"] == 3 and found["failed"] == 1
    assert found["short"] == 1 and found["prompt_tokens"] == 42
    assert found["ttft_p50_ms"] == pytest.approx(100.0) and found["ttft_p99_ms"] == pytest.approx(300.0)
    assert found["gap_p50_ms"] == pytest.approx(100.0) and found["gap_p99_ms"] == pytest.approx(200.0)
    assert found["stream_tokens_per_s"] == pytest.approx(2 / 0.2)
    assert math.isnan(load.percentile([], 50))


def test_pieces_of_both_dialects() -> None:
    assert load.read_piece("ollama", '{"message": {"content": "a"}, "done": false}') == (True, 0, 0)
    assert load.read_piece("ollama", '{"message": {"content": ""}, "eval_count": 7, "prompt_eval_count": 5}') == (False, 7, 5)
    with pytest.raises(RuntimeError, match="broken"):
        load.read_piece("ollama", '{"error": "broken"}')
    assert load.read_piece("openai", 'data: {"choices": [{"delta": {"content": "a"}}]}') == (True, 0, 0)
    assert load.read_piece("openai", 'data: {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 4}}') == (
        False,
        9,
        4,
    )
    assert load.read_piece("openai", "data: [DONE]") == (False, 0, 0)
    assert load.read_piece("openai", ": keep-alive") == (False, 0, 0)


def test_requests_of_both_dialects() -> None:
    path, asked = load.body(Target("http://x", "m", "ollama"), Chat("hi", tokens=5))
    assert path == "/api/chat" and asked["options"] == {"temperature": 0, "num_predict": 5}
    path, asked = load.body(Target("http://x", "m", "openai"), Chat("hi", "be brief", tokens=5))
    assert path == "/v1/chat/completions" and asked["max_tokens"] == 5 and asked["stream_options"] == {"include_usage": True}
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]


def test_workloads_are_the_same_each_time_and_differ_where_they_say() -> None:
    for make in WORKLOADS.values():
        assert make(8, 1) == make(8, 1)
        assert not {chat.text for chat in make(8, 1)} & {chat.text for chat in make(8, 2)}
    assert len({chat.system for chat in WORKLOADS["shared"](8, 1)}) == 1
    assert len({chat.system[:40] for chat in WORKLOADS["separate"](8, 1)}) == 8
    lengths = [len(chat.text.split()) > 1000 for chat in WORKLOADS["mixed"](8, 1)]
    assert lengths == [True, False, False, False] * 2


class Answers(BaseHTTPRequestHandler):
    """Three pieces for every chat; "fail" in its text: a refusal, "break": the stream ends in an error."""

    active = most = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.lock:
            Answers.active += 1
            Answers.most = max(Answers.most, Answers.active)
        self.send_response(503 if "fail" in text else 200)
        self.end_headers()
        for number in range(3):
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
            if number == 1 and "break" in text:
                self.wfile.write(b'data: {"error": {"message": "broken"}}\n\n')
        with self.lock:
            Answers.active -= 1
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n')

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client leaves a stream that says "error"
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[Target]:
    Answers.most = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(f"http://127.0.0.1:{server.server_address[1]}", "m")
        server.shutdown()
        thread.join()


def test_closed_loop_answers_all_with_so_many_users(answers: Target) -> None:
    chats = [Chat("hello")] * 10 + [Chat("fail"), Chat("break")]
    found = asyncio.run(load.closed(answers, chats, users=3))
    assert found["chats"] == 12 and found["failed"] == 2 and found["tokens"] == 70
    assert 1 <= Answers.most <= 3


def test_open_loop_sends_at_a_rate(answers: Target) -> None:
    found = asyncio.run(load.opened(answers, [Chat("hello")] * 20, rate=100.0))
    assert found["chats"] == 20 and found["failed"] == 0 and found["tokens"] == 140


def test_a_server_that_is_not_there_fails_every_chat() -> None:
    found = asyncio.run(load.closed(Target("http://127.0.0.1:1", "m"), [Chat("hello")] * 2, users=2))
    assert found["failed"] == 2 and found["tokens_per_s"] == 0


def test_rounds_and_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    work = serve.rounds([1, 16], [2.0])
    assert [each.name for each in work] == ["short 1", "short 16", "shared 16", "separate 16", "mixed 16", "short 2/s"]
    host = serve.Host("smollm2", Path("m.gguf"), 2)
    assert host.groups("A", work) == [work]
    assert [[each.slots for each in group] for group in host.groups("B", work)] == [[1], [16] * 4, [32]]
    monkeypatch.delenv("LLAMA_CPP_BIN", raising=False)
    monkeypatch.setenv("VLLM", "/opt/vllm")
    monkeypatch.setenv("VLLM_MODELS", "smollm2=/models/a, gemma3=/models/b")
    assert [host.server(turn) for turn in "ABC"] == ["ollamapy", "", "vLLM bf16"]
    assert servers.vllm_folders() == {"smollm2": Path("/models/a"), "gemma3": Path("/models/b")}


def model_report() -> dict[str, Any]:
    def row(server: str, turn: int, rate: float, ttft: float) -> dict[str, Any]:
        figures = {"tokens_per_s": rate, "stream_tokens_per_s": 1.0, "ttft_p50_ms": ttft, "ttft_p99_ms": ttft, "failed": 0}
        gaps = {"gap_p50_ms": 1.0, "gap_p99_ms": math.nan}
        return {"server": server, "turn": turn, "workload": "short", "level": 16, "open": False, **figures, **gaps}

    rows = [row("ollamapy", 0, 900.0, 10.0), row("llama-server", 1, 300.0, 40.0), row("ollamapy", 2, 1100.0, 30.0)]
    for ours, failed in ((rows[0], 0), (rows[2], 1)):  # the other is of an older report
        ours |= {"chats": 4, "failed": failed, "short": 1, "prompt_tokens": 34 * (4 - failed)}
    first = {"ollamapy": 0.5, "llama-server": 0.6}
    facts = {"commit": "abc", "load_average": 0.1, "run_verbose_eval_rate": 123.4}
    return {"file": "smollm2", "rounds": rows, "first_token_s": first, **facts}


def test_table_has_medians_and_ratios() -> None:
    text = serve.render(model_report())
    ours, theirs = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[-2:]]
    assert ours == ["short 16", "ollamapy", "1000", "", "20", "20", "", "1", "-", "34", "2", "1"]
    assert theirs == ["short 16", "llama-server", "300", "3.33x", "40", "40", "0.50x", "1", "-", "-", "-", "0"]
    assert "123.4 tokens/s" in text


def test_picture_is_drawn_or_says_what_is_missing(tmp_path: Path) -> None:
    report = {"machine": {"cpu": "Some CPU", "commit": "abc"}, "threads": 2, "models": [model_report()]}
    assert serve_plot.lines(model_report()["rounds"], "tokens_per_s", False) == {
        "ollamapy": {16: 1000.0},
        "llama-server": {16: 300.0},
    }
    said = serve_plot.draw(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() == said.startswith("drew")


def test_one_round_on_a_real_daemon(tmp_path: Path) -> None:
    host = serve.Host("smollm2", serve.model_path("smollm2", tmp_path), 1)
    said: list[str] = []
    found = serve.measure(host, [Round("short", 2)], "A", said.append)
    assert [row["failed"] for row in found["rounds"]] == [0] and found["rounds"][0]["tokens"] > 4
    assert found["first_token_s"]["ollamapy"] > 0 and "tokens/s" in said[0]
