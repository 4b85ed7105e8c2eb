"""Prometheus' figures, scraped from a running daemon and read by Prometheus' own parser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench import fake_engine
from bench.server import MODEL
from ollamapy.engine.protocol import STEP_TOKENS, Stats
from ollamapy.server.metrics import Metrics
from ollamapy.server.record import FAST, Histogram, Record, Totals
from tests.daemon import ROOT, free_port
from tests.server.counting import counting
from tests.server.daemon import Daemon, connect, read_head, request_bytes

LABEL = f"{MODEL}:latest"


class Scraped:
    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon, self.url = daemon, f"http://127.0.0.1:{port}/metrics"

    def get(self, **headers: str) -> httpx.Response:
        return httpx.get(self.url, headers=headers, trust_env=False, timeout=10)

    def value(self, name: str, **labels: str) -> float:
        """Of the sample with these labels besides the model's; 0 where there is none."""
        found = 0.0
        for family in text_string_to_metric_families(self.get().text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found = sample.value
        return found


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    port = free_port()
    with counting(tmp_path_factory.mktemp("metrics"), OLLAMAPY_METRICS=f"127.0.0.1:{port}") as daemon:
        yield Scraped(daemon, port)


def ask(scraped: Scraped, tokens: int, pace: int = 0) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Count.", "stream": False, "options": {"num_predict": tokens, "seed": pace}}
    return scraped.daemon.post("/api/generate", body)


def test_a_request_is_counted(scraped: Scraped) -> None:
    before = {
        name: scraped.value(name)
        for name in ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:e2e_request_latency_seconds_count")
    }
    count, gaps = "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count"
    firsts, between = scraped.value(count), scraped.value(gaps)
    stopped = scraped.value("vllm:request_success_total", finished_reason="length")
    answer = ask(scraped, 20, pace=100).json()
    assert answer["response"] == fake_engine.text(20)
    assert scraped.value("vllm:generation_tokens_total", model_name=LABEL) - before["vllm:generation_tokens_total"] == 20
    prompt = scraped.value("vllm:prompt_tokens_total") - before["vllm:prompt_tokens_total"]
    assert prompt == answer["prompt_eval_count"] == scraped.value("vllm:prefix_cache_queries_total")
    assert scraped.value("vllm:e2e_request_latency_seconds_count") == before["vllm:e2e_request_latency_seconds_count"] + 1
    assert scraped.value(count) == firsts + 1 and scraped.value(gaps) == between + 19
    assert 0.1 < scraped.value("vllm:inter_token_latency_seconds_sum") < 2
    assert scraped.value("vllm:request_success_total", finished_reason="length") == stopped + 1
    assert scraped.value("ollamapy_http_requests_total", dialect="ollama", status="200") >= 1
    assert scraped.value("ollamapy_model_bytes", model_name=LABEL) == 1500


def test_gauges_show_what_runs_now(scraped: Scraped) -> None:
    ask(scraped, 1)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, scraped, 60, 50) for _ in range(3)]
        deadline = time.monotonic() + 5
        while scraped.value("vllm:num_requests_running") != 3:
            assert time.monotonic() < deadline
        early = scraped.value("vllm:generation_tokens_total")
        time.sleep(0.2)
        assert scraped.value("vllm:generation_tokens_total") > early  # not only when they end
        assert {one.result().status_code for one in asked} == {200}
    assert scraped.value("vllm:num_requests_running") == scraped.value("vllm:num_requests_waiting") == 0


def test_a_client_that_leaves_is_an_abort(scraped: Scraped) -> None:
    def aborted() -> float:
        return scraped.value("vllm:request_success_total", finished_reason="abort")

    before = aborted()
    with connect(scraped.daemon) as sock:
        body = {"model": MODEL, "prompt": "Count.", "options": {"num_predict": 5000, "seed": 50}}
        sock.sendall(request_bytes("POST", "/api/generate", body))
        assert read_head(sock)[0] == 200
    deadline = time.monotonic() + 5
    while aborted() != before + 1:
        assert time.monotonic() < deadline


def test_what_clients_make_up_is_no_label(scraped: Scraped) -> None:
    assert scraped.daemon.post("/api/generate", {"model": "evil-name", "prompt": "x"}).status_code == 404
    text = scraped.get().text
    assert "evil-name" not in text and 'status="404"' in text


def test_its_address_serves_nothing_else(scraped: Scraped) -> None:
    assert httpx.get(scraped.url.replace("/metrics", "/api/tags"), trust_env=False).status_code == 404
    assert scraped.get(Host="evil.example").status_code == 403 and scraped.get(Origin="https://evil.example").status_code == 403
    assert httpx.get(f"{scraped.daemon.url}/metrics", trust_env=False).status_code == 404
    assert scraped.get().headers["content-type"].startswith("text/plain")
    assert scraped.get(Accept="application/openmetrics-text").text.endswith("# EOF\n")


def test_an_address_in_use_is_an_error(scraped: Scraped, tmp_path: Path) -> None:
    address = scraped.url.removeprefix("http://").removesuffix("/metrics")
    command = [sys.executable, "-m", "ollamapy", "serve"]
    environment = {"OLLAMA_HOST": f"127.0.0.1:{free_port()}", "OLLAMAPY_METRICS": address, "OLLAMA_MODELS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=30)
    assert done.returncode == 1 and f"Error: listen tcp {address}: bind: address already in use" in done.stderr


def test_histograms() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 3), (9.0, 4)):
        histogram.observe(value, times)
    assert histogram.counts == [3, 3, 4] and histogram.sum == pytest.approx(43.0)


def test_tokens_that_come_together() -> None:
    totals = Totals()
    record = Record(totals, "POST", "/api/chat")
    record.begin("m")
    answer = record.answer(3)
    answer.took(1, record.start + 5_000_000)
    answer.took(4, record.start + 45_000_000)
    answer.cached_tokens = 2
    answer.generated("repeat", 3, 4, 5)
    record.close()
    figures = totals.models["m"]
    assert figures.generation_tokens == 5 and figures.cache_hits == 2 and figures.finished["repeat"] == 1
    assert figures.inter_token.counts[FAST.index(0.01)] == 4 and figures.inter_token.sum == pytest.approx(0.04)
    assert figures.time_to_first_token.sum == pytest.approx(0.005)


def test_tokens_of_two_answers_in_turn() -> None:
    """Between one's own tokens, not those of the other."""
    totals = Totals()
    record = Record(totals, "POST", "/v1/completions")
    record.begin("m")
    answers = [record.answer(3), record.answer(4)]
    for step in range(5):
        for place, answer in enumerate(answers):
            answer.took(1, record.start + (20 * step + 10 * place + 1) * 1_000_000)
    record.close()
    figures = totals.models["m"]
    assert figures.inter_token.counts[FAST.index(0.025)] == 8 and figures.inter_token.sum == pytest.approx(8 * 0.02)
    assert figures.time_to_first_token.sum == pytest.approx(0.012) and figures.prompt_tokens == 7


def test_each_of_several_answers_counts(scraped: Scraped) -> None:
    """Three choices, of which each has its own tokens, times and end."""
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "inter_token_latency_seconds_count")
    names += ("time_to_first_token_seconds_count", "request_decode_time_seconds_count")
    names += ("request_generation_tokens_count", "request_inference_time_seconds_count")
    before = {name: scraped.value(f"vllm:{name}") for name in names}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 20, "seed": 100, "n": 3}
    usage = scraped.daemon.post("/v1/chat/completions", body).json()["usage"]
    new = {name: scraped.value(f"vllm:{name}") - value for name, value in before.items()}
    assert new["generation_tokens_total"] == usage["completion_tokens"] == 60
    assert new["prompt_tokens_total"] == 3 * usage["prompt_tokens"]
    assert new["time_to_first_token_seconds_count"] == new["request_generation_tokens_count"] == 3
    assert new["request_decode_time_seconds_count"] == new["request_inference_time_seconds_count"] == 3
    assert new["inter_token_latency_seconds_count"] == 57


def test_an_engine_s_counts_outlive_it() -> None:
    """Each by what is new since it was asked last, of whatever engine of the model."""
    metrics = Metrics(Totals(), None)  # type: ignore[arg-type]
    empty = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    steps = [0] * (len(STEP_TOKENS) + 1)
    steps[0], steps[5], steps[-1] = 1, 2, 3
    told = msgspec.structs.replace(
        empty,
        **{name: 2 + place for place, name in enumerate(COUNTED)},
        step_tokens=tuple(steps),
        num_step_tokens=90_000,
    )
    more = msgspec.structs.replace(told, num_evictions=told.num_evictions + 10, step_tokens=(2, *steps[1:]))
    for stats, before in ((told, None), (more, told), (told, None)):
        metrics._add("m", stats, before)
    found = {sample.name: sample for family in metrics._of_engines() for sample in family.samples}
    for place, (name, metric) in enumerate(COUNTED.items()):
        assert found[f"{metric}_total"].value == 2 * (2 + place) + 10 * (name == "num_evictions")
    buckets = {
        sample.labels["le"]: sample.value
        for family in metrics._of_engines()
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_bucket"
    }
    assert (buckets["1.0"], buckets["64.0"], buckets["128.0"], buckets["16384.0"], buckets["+Inf"]) == (3, 3, 7, 7, 13)
    assert found["vllm:iteration_tokens_total_sum"].value == 180_000


COUNTED = {
    "num_preemptions": "vllm:num_preemptions",
    "num_drafts": "vllm:spec_decode_num_drafts",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "num_evictions": "ollamapy_cached_blocks_evicted",
    "disk_written_blocks": "ollamapy_disk_blocks_written",
    "disk_read_tokens": "ollamapy_disk_tokens_read",
    "disk_bad_files": "ollamapy_disk_bad_files",
    "disk_failed_writes": "ollamapy_disk_failed_writes",
}


def test_the_dashboard_asks_for_what_there_is(scraped: Scraped) -> None:
    """Every metric and label in bench/grafana.json is in a scrape after one request."""
    ask(scraped, 2)
    there: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scraped.get().text):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads((ROOT / "bench" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        names = re.findall(r"\b(?:vllm:|ollamapy_|process_)\w+", expression)
        assert names and set(names) <= set(there), expression
        asked = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert asked <= set.union(*(there[name] for name in names)), expression
