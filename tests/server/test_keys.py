"""Servers with API keys: every route asks for one, the official clients send it, the log has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import ollama
import openai
import pytest

from bench.server import MODEL
from ollamapy.server.keys import KeysError, read_keys
from tests.daemon import free_port
from tests.server.counting import counting
from tests.server.daemon import Daemon, running
from tests.server.test_guard import endpoints

KEYS = ("first-key-1", "second-key-2")
OPEN = ("/", "/api/version")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with counting(tmp_path_factory.mktemp("locked"), key=KEYS[0], OLLAMAPY_API_KEYS=", ".join(KEYS)) as daemon:
        yield daemon


@pytest.mark.parametrize(("method", "path"), list(endpoints()))
def test_no_route_is_forgotten(locked: Daemon, method: str, path: str) -> None:
    needs = "this server needs an API key: send it as Authorization: Bearer KEY"
    for headers, text in (
        ({}, needs),
        ({"Authorization": "Bearer"}, needs),
        ({"Authorization": "Bearer second-key-"}, "invalid API key"),
        ({"x-api-key": "second-key-22"}, "invalid API key"),
    ):
        answer = httpx.request(method, locked.url + path, json={}, headers=headers, trust_env=False)
        assert answer.status_code == (200 if path in OPEN else 401), headers
        if path not in OPEN and method != "HEAD":
            failure = answer.json()["error"]
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (failure["message"] if path.startswith("/v1/") else failure) == text


def test_a_path_that_is_none_asks_for_a_key_too(locked: Daemon) -> None:
    assert httpx.get(f"{locked.url}/nothing", trust_env=False).status_code == 401
    assert httpx.get(f"{locked.url}/nothing", headers={"x-api-key": KEYS[1]}, trust_env=False).status_code == 404


@pytest.mark.parametrize(
    "header", ["Authorization: Bearer {}", "authorization: bearer  {}", "Authorization: {}", "X-Api-Key: {}"]
)
@pytest.mark.parametrize("key", KEYS)
def test_headers(locked: Daemon, header: str, key: str) -> None:
    name, _, value = header.format(key).partition(": ")
    assert httpx.get(f"{locked.url}/api/tags", headers={name: value}, trust_env=False).status_code == 200


def test_the_ollama_client(locked: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with ollama.Client(locked.url, headers={"Authorization": f"Bearer {KEYS[1]}"}) as client:
        assert client.generate(MODEL, "x", options={"num_predict": 2}).response
    wrong = {"Authorization": "Bearer wrong"}
    with ollama.Client(locked.url, headers=wrong) as client, pytest.raises(ollama.ResponseError) as failed:
        client.generate(MODEL, "x")
    assert failed.value.status_code == 401 and failed.value.error == "invalid API key"


def test_the_openai_client(locked: Daemon) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        made = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2)
        assert made.choices[0].message.content
    other = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with other as client, pytest.raises(openai.AuthenticationError) as failed:
        client.models.list()
    assert failed.value.code == "invalid_api_key"


def test_preflights_carry_no_key(locked: Daemon) -> None:
    """A browser sends none with them, and must be able to read the 401 of what comes after."""
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{locked.url}/api/chat", headers=asked, trust_env=False).status_code == 204
    refused = httpx.post(f"{locked.url}/api/chat", json={}, headers={"Origin": asked["Origin"]}, trust_env=False)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == asked["Origin"]


def test_the_log_has_no_key(locked: Daemon) -> None:
    assert httpx.get(f"{locked.url}/api/tags?x=1", headers={"x-api-key": KEYS[0]}, trust_env=False).status_code == 200
    assert httpx.get(f"{locked.url}/api/tags", trust_env=False).status_code == 401
    log = locked.log.read_text()
    assert "OLLAMAPY_API_KEYS" in log and "status=401" in log and not any(key in log for key in KEYS)


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# two people\n\none,with,commas\n  two  \r\n")
    assert read_keys(str(path)) == ("one,with,commas", "two")
    assert read_keys("") == () and read_keys(" a ,b,") == ("a", "b")


@pytest.mark.parametrize("text", [",", " , ", "a b", "\u00e9", "/nowhere/keys", "/", "a\x01"])
def test_what_is_no_key_does_not_open_the_server(text: str) -> None:
    with pytest.raises(KeysError):
        read_keys(text)


def test_a_server_with_broken_keys_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    daemon = Daemon(tmp_path / "models", tmp_path / "log", OLLAMAPY_API_KEYS=str(tmp_path / "empty"))
    assert daemon.stop() == 1 and "no key in it" in daemon.log.read_text()


@pytest.mark.parametrize(("keys", "warned"), [("", True), ("a-key", False)])
def test_beyond_loopback_there_is_a_warning_without_keys(tmp_path: Path, keys: str, warned: bool) -> None:
    port = free_port()
    beyond = {"OLLAMA_HOST": f"0.0.0.0:{port}", "OLLAMAPY_API_KEYS": keys}
    with running(tmp_path / "models", tmp_path / "log", port=port, **beyond) as daemon:
        assert daemon.answers()
    assert ("without authentication" in daemon.log.read_text()) is warned
