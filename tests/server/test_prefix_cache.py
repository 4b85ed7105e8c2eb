"""Cached prefixes through the API: who shares them, what is reported, and that they survive the daemon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.server.daemon import Daemon, running

HEAD = "".join(f"Rule {i}: be kind to the {i}th cat that you meet. " for i in range(25))


def cached(daemon: Daemon, path: str, body: dict[str, Any], key: str = "") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = daemon.post(path, {"model": "smollm2", "stream": False, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    if "usage" in made:
        return int(made["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert made["prompt_eval_count"] > made.get("prompt_eval_cached_count", 0)
    return int(made.get("prompt_eval_cached_count", 0))


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions"])
def test_keys_and_salts_share_nothing(daemon: Daemon, path: str) -> None:
    text = f"{path}: {HEAD}"
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    short: dict[str, Any] = {"max_tokens": 1} if path.startswith("/v1") else {"options": {"num_predict": 1}}
    body = {**asked, **short}
    assert cached(daemon, path, body) < 64, "nothing but a template's head"
    for key, salt in (("", ""), ("one", ""), ("two", ""), ("one", "s")):
        mine = {**body, "cache_salt": salt}
        first, second = (cached(daemon, path, mine, key) for _ in range(2))
        assert (first < 64 or key + salt == "") and second > 200, (key, salt)


def test_a_stop_string_does_not_hide_the_count(daemon: Daemon) -> None:
    body = {"prompt": HEAD, "raw": True, "options": {"num_predict": 40, "temperature": 0, "stop": [" ", "."]}}
    cached(daemon, "/api/generate", body)
    assert cached(daemon, "/api/generate", body) > 200


def test_a_bad_salt_is_refused(daemon: Daemon) -> None:
    for salt, status in (("x" * 257, 400), (5, 400), ("x" * 256, 200)):
        body = {"model": "smollm2", "prompt": "a", "cache_salt": salt, "stream": False, "options": {"num_predict": 1}}
        assert daemon.post("/api/generate", body).status_code == status


def test_a_prefix_outlives_the_daemon(tmp_path: Path, smollm2_path: Path) -> None:
    variables = {"OLLAMAPY_PREFIX_CACHE_BYTES": str(1 << 30), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    body = {"prompt": HEAD, "raw": True, "options": {"num_predict": 4, "temperature": 0}}
    with running(tmp_path / "models", tmp_path / "log", **variables) as daemon:
        with ollama.Client(daemon.url) as client:
            client.create("smollm2", files={"smollm2.gguf": client.create_blob(smollm2_path)})
        assert [cached(daemon, "/api/generate", body) > 200 for _ in range(2)] == [False, True]
        end = time.monotonic() + 20
        while _stats(daemon)["disk_written_blocks"] < 17 and time.monotonic() < end:
            time.sleep(0.05)
        text = daemon.post("/api/generate", {"model": "smollm2", "stream": False, **body}).json()["response"]
    with running(tmp_path / "models", tmp_path / "log", **variables) as daemon:
        assert cached(daemon, "/api/generate", body) > 200
        assert _stats(daemon)["disk_read_tokens"] > 200 and _stats(daemon)["integrity"] == "ok"
        assert daemon.post("/api/generate", {"model": "smollm2", "stream": False, **body}).json()["response"] == text


def test_a_larger_context_is_only_a_limit_on_blocks(tmp_path: Path, smollm2_path: Path) -> None:
    """On every API: the engine stays, and so do its prefixes. More than all of its blocks takes another engine."""
    with running(tmp_path / "models", tmp_path / "log", OLLAMA_CONTEXT_LENGTH="256") as daemon:
        with ollama.Client(daemon.url) as client:
            client.create("smollm2", files={"smollm2.gguf": client.create_blob(smollm2_path)})

        def say(path: str, num_ctx: int) -> tuple[int, int, str]:
            """Tokens of the prompt, those of them in the cache, and the answer."""
            asked = {"messages": [{"role": "user", "content": HEAD}]} if "chat" in path else {"prompt": HEAD}
            options = {"num_predict": 4, "temperature": 0, **({"num_ctx": num_ctx} if num_ctx else {})}
            answer = daemon.post(path, {"model": "smollm2", "stream": False, **asked, "options": options})
            if answer.status_code != 200:
                assert "256" in answer.text
                return 0, 0, ""
            assert "warning" not in str(answer.headers) or not num_ctx
            made = answer.json()
            if "usage" in made:
                usage, (choice,) = made["usage"], made["choices"]
                text = choice["text"] if "text" in choice else choice["message"]["content"]
                return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text
            text = made["response"] if "response" in made else made["message"]["content"]
            return made["prompt_eval_count"], made.get("prompt_eval_cached_count", 0), text

        assert say("/api/chat", 0)[0] <= 256, "it is cut"
        pid = daemon.engine()["pid"]
        texts = []
        for path in ("/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions"):
            count, _, text = say(path, 1024)
            again = say(path, 2048)
            assert count > 256 and again[0] == count and count - again[1] <= 16 and again[2] == text
            assert path.startswith("/api") or say(path, 0)[0] == 0, "refused, with the limit"
            texts.append(text)
        embed = {"model": "smollm2", "input": HEAD}
        counts = [
            daemon.post("/api/embed", {**embed, "options": {"num_ctx": n}}).json()["prompt_eval_count"] for n in (64, 1024)
        ]
        assert counts[0] == 64 and counts[1] > 256
        engine = daemon.engine()
        assert (engine["pid"], engine["context_length"], engine["max_context"]) == (pid, 256, 2048)
        assert say("/api/generate", 4096)[2] == texts[0] and daemon.engine()["pid"] != pid


def _stats(daemon: Daemon) -> dict[str, Any]:
    stats: dict[str, Any] = daemon.get("/api/ps?verbose=1")["models"][0]["engine"]["stats"]
    return stats
