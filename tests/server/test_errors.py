"""Statuses and texts that clients match on, in the order of Ollama's checks; and that errors tell nothing of our insides."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from tests.server.daemon import Daemon, connect, read_head, request_bytes

MODEL = "smollm2"
NO_MODEL = "model 'missing' not found"
TRY_PULL = 'model "missing" not found, try pulling it first'
SHA = "sha256:" + "0" * 64
USER = [{"role": "user", "content": "x"}]
INSIDES = re.compile(r"0x[0-9a-f]{6,}|Traceback|object at|/(?:tmp|home|root|usr)/")

CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("generate", {"model": MODEL, "prompt": "x", "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
    ("generate", {"model": "m:cloud:local"}, 400, "use either :local or :cloud, not both"),
    ("generate", {"prompt": "x"}, 404, "model '' not found"),
    ("generate", {"model": "a//b", "prompt": "x"}, 400, "invalid model name"),
    ("generate", {"model": "m:", "prompt": "x"}, 400, "invalid model name"),
    ("generate", {"model": "../../etc/passwd", "prompt": "x"}, 400, "invalid model name"),
    ("generate", {"model": "missing", "prompt": "x"}, 404, NO_MODEL),
    ("generate", {"model": "missing", "prompt": "", "keep_alive": 0}, 404, NO_MODEL),
    ("generate", {"model": "m:cloud", "prompt": "x"}, 501, "cloud models are not supported: m:cloud"),
    ("generate", {"model": MODEL, "prompt": "x", "raw": True, "system": "s"}, 400,
     "raw mode does not support template, system, or context"),
    ("generate", {"model": MODEL, "prompt": "x", "raw": True, "context": [1]}, 400,
     "raw mode does not support template, system, or context"),
    ("generate", {"model": MODEL, "prompt": "x", "think": True}, 400, '"smollm2" does not support thinking'),
    ("generate", {"model": MODEL, "prompt": "x", "think": "high"}, 400, '"smollm2" does not support thinking'),
    ("generate", {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "smollm2 does not support insert"),
    ("generate", {"model": MODEL, "prompt": "x", "format": "xml"}, 400,
     'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
    ("generate", {"model": MODEL, "prompt": "x", "format": {"type": 5}}, 400,
     "invalid format: type must be a string or array of strings"),
    ("generate", {"model": MODEL, "prompt": "x", "images": ["AAAA"]}, 501, "images: not supported yet"),
    ("generate", {"model": MODEL, "prompt": "x", "keep_alive": "1"}, 400, 'time: invalid duration "1"'),
    ("generate", {"model": MODEL, "prompt": "x", "options": {"top_k": "many"}}, 400, 'option "top_k" must be of type integer'),
    ("generate", {"model": MODEL, "prompt": "x", "options": {"seed": 2**70}}, 400, 'option "seed" is out of range'),
    ("embed", {"input": "x"}, 404, "model '' not found"),
    ("embed", {"model": "missing", "input": "x"}, 404, TRY_PULL),
    ("embed", {"model": MODEL, "input": 5}, 400, "invalid input type"),
    ("embed", {"model": MODEL, "input": ["a", 5]}, 400, "invalid input type"),
    ("embed", {"model": MODEL, "input": "x", "dimensions": -1}, 400, "dimensions must not be negative"),
    ("embed", {"model": MODEL, "input": ["x"] * 2049}, 400, "too many inputs: 2049, at most 2048 in one request"),
    ("embeddings", {"prompt": "x"}, 400, "model is required"),
    ("embeddings", {"model": "missing", "prompt": "x"}, 404, TRY_PULL),
    ("chat", {"messages": USER}, 400, "model is required"),
    ("chat", {"model": "missing", "messages": USER}, 404, NO_MODEL),
    ("chat", {"model": "missing", "messages": [], "keep_alive": 0}, 404, NO_MODEL),
    ("chat", {"model": MODEL, "messages": USER, "think": True}, 400, '"smollm2" does not support thinking'),
    ("chat", {"model": MODEL, "messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400,
     "smollm2 does not support tools"),
    ("chat", {"model": MODEL, "messages": USER, "format": []}, 400,
     'invalid format: []; expected "json" or a valid JSON Schema object'),
    ("chat", {"model": MODEL, "messages": [{"role": "user", "content": "x", "images": ["AA"]}]}, 501,
     "images: not supported yet"),
    ("show", {}, 400, "model is required"),
    ("show", {"model": "a//b"}, 400, "invalid model name"),
    ("show", {"model": "missing"}, 404, NO_MODEL),
    ("copy", {"source": "", "destination": "x"}, 400, 'source "" is invalid'),
    ("copy", {"source": MODEL, "destination": "a//b"}, 400, 'destination "a//b" is invalid'),
    ("copy", {"source": "missing", "destination": "x"}, 404, 'model "missing" not found'),
    ("delete", {"model": ""}, 400, 'name "" is invalid'),
    ("delete", {"name": "a//b"}, 400, 'name "a//b" is invalid'),
    ("delete", {"model": "missing"}, 404, NO_MODEL),
    ("create", {"model": "", "from": MODEL}, 400, "invalid model name"),
    ("create", {"model": "x"}, 400, "neither 'from' or 'files' was specified"),
    ("create", {"model": "x", "from": "missing"}, 404, NO_MODEL),
    ("create", {"model": "x", "files": {"/etc/passwd": SHA}}, 400, "file path must be relative"),
    ("create", {"model": "x", "files": {"m.gguf": "sha256:zz"}}, 400, "invalid digest format"),
    ("create", {"model": "x", "from": MODEL, "template": "{{ .X "}, 400, ""),
    ("pull", {"model": "x"}, 501, "pull: not supported yet"),
    ("push", {"model": "x"}, 501, "push: not supported yet"),
]  # fmt: skip


def send(daemon: Daemon, path: str, body: object) -> httpx.Response:
    method = "DELETE" if path == "delete" else "POST"
    return httpx.request(method, f"{daemon.url}/api/{path}", json=body, timeout=60, trust_env=False)


@pytest.mark.parametrize(("path", "body", "status", "text"), CASES)
@pytest.mark.parametrize("stream", [None, False])
def test_statuses_and_texts(
    daemon: Daemon, path: str, body: dict[str, Any], status: int, text: str, stream: bool | None
) -> None:
    answer = send(daemon, path, body if stream is None else {**body, "stream": stream})
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert (answer.status_code, error) == (status, text or error)
    assert not INSIDES.search(error)


@pytest.mark.parametrize("path", ["generate", "chat", "embed", "embeddings", "show", "copy", "delete", "create"])
@pytest.mark.parametrize(
    ("body", "text"), [(b"", "missing request body"), (b"{", "invalid request:"), (b"[]", "invalid request:")]
)
def test_bodies(daemon: Daemon, path: str, body: bytes, text: str) -> None:
    method = "DELETE" if path == "delete" else "POST"
    answer = httpx.request(method, f"{daemon.url}/api/{path}", content=body, trust_env=False)
    assert answer.status_code == 400 and answer.json()["error"].startswith(text)


def test_the_content_type_of_a_body_is_not_looked_at(daemon: Daemon) -> None:
    answer = httpx.post(
        f"{daemon.url}/api/show", content=b'{"model":"missing"}', headers={"Content-Type": "text/plain"}, trust_env=False
    )
    assert answer.status_code == 404


def test_a_disabled_feature_of_v1_is_an_openai_error(daemon: Daemon) -> None:
    for path in ("responses", "messages", "audio/transcriptions"):
        answer = daemon.post(f"/v1/{path}", {})
        assert answer.status_code == 501 and answer.json()["error"]["type"] == "api_error"
    empty = httpx.post(daemon.url + "/v1/chat/completions", trust_env=False)
    assert empty.status_code == 400 and empty.json()["error"]["message"] == "missing request body"


def test_methods_and_paths(daemon: Daemon) -> None:
    def ask(method: str, path: str) -> tuple[int, str]:
        answer = httpx.request(method, daemon.url + path, trust_env=False)
        return answer.status_code, answer.text

    assert ask("GET", "/") == (200, "Ollama is running") and ask("HEAD", "/") == (200, "")
    assert ask("HEAD", "/api/version") == ask("HEAD", "/api/tags") == (200, "")
    assert ask("GET", "/api/generate") == ask("POST", "/api/tags") == ask("PUT", "/") == (405, "405 method not allowed")
    assert ask("HEAD", "/api/ps")[0] == 405
    assert ask("GET", "/api/nothing") == ask("POST", "/v1/images/generations") == (404, "404 page not found")
    assert ask("OPTIONS", "/api/chat") == (204, "")


def test_blobs(daemon: Daemon) -> None:
    data = b"a blob" * 1000
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

    def ask(method: str, name: str, content: bytes = b"") -> tuple[int, str]:
        answer = httpx.request(method, f"{daemon.url}/api/blobs/{name}", content=content, trust_env=False)
        return answer.status_code, answer.text

    assert ask("HEAD", digest)[0] == 404
    status, text = ask("POST", digest, b"other")
    assert status == 400 and "digest mismatch, expected" in text
    assert ask("HEAD", digest)[0] == 404
    assert ask("POST", digest, data)[0] == 201 and ask("POST", digest, b"not read")[0] == 200
    assert ask("HEAD", digest)[0] == 200 and ask("HEAD", digest.replace(":", "-"))[0] == 200
    for bad in ("sha256:zz", "sha1:" + "0" * 64, "..%2f..%2fetc", "sha256:" + "0" * 63):
        assert ask("POST", bad, data)[0] in (400, 404) and ask("HEAD", bad)[0] in (400, 404)
    made = daemon.post("/api/create", {"model": "x", "files": {"m.gguf": digest}, "stream": False})
    assert (made.status_code, made.json()) == (400, {"error": "supplied file was not in GGUF format"})


def test_an_upload_that_breaks_off_leaves_nothing(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        head = {"Content-Length": str(9 << 20), "Content-Type": "application/octet-stream"}
        sock.sendall(request_bytes("POST", f"/api/blobs/{SHA}", headers=head) + b"x" * (5 << 20))
    assert httpx.head(f"{daemon.url}/api/blobs/{SHA}", trust_env=False).status_code == 404


def test_bodies_over_the_limit_are_refused(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        sock.sendall(request_bytes("POST", "/api/chat", headers={"Content-Length": str(64 << 20)}))
        assert read_head(sock)[0] == 413  # by what is declared, before a byte of it came
    with connect(daemon) as sock:
        sock.sendall(request_bytes("POST", "/api/chat", headers={"Content-Length": "-", "Transfer-Encoding": "chunked"}))
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(34):
            try:
                sock.sendall(chunk)
            except OSError:  # it has answered and closed
                break
        assert read_head(sock)[0] == 413  # by what came


def test_headers_over_the_limits_are_refused(daemon: Daemon) -> None:
    for extra in ({f"X-{n}": "1" for n in range(120)}, {"X": "a" * (65 << 10)}):
        with connect(daemon) as sock:
            sock.sendall(request_bytes("GET", "/api/version", headers=extra))
            assert read_head(sock)[0] == 431


def test_a_damaged_file_is_named_without_its_path(daemon: Daemon, smollm2_path: Path) -> None:
    data = smollm2_path.read_bytes()[:3_000_000]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert httpx.post(f"{daemon.url}/api/blobs/{digest}", content=data, trust_env=False).status_code == 201
    for stream in (True, False):
        made = daemon.post("/api/create", {"model": "x", "files": {"m.gguf": digest}, "stream": stream})
        text = made.text
        assert "m.gguf: " in text and "offset" in text and not INSIDES.search(text)


def test_a_model_that_cannot_be_run_says_why(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    metadata = {"general.architecture": "nosuch", "nosuch.block_count": 1, "nosuch.context_length": 8}
    write_gguf(path, metadata, [("token_embd.weight", GGMLType.F32, (4, 4), bytes(64))])
    with ollama.Client(daemon.url) as client:
        client.create("odd", files={"odd.gguf": client.create_blob(path)})
    answer = daemon.post("/api/generate", {"model": "odd", "prompt": "x"})
    assert answer.status_code == 400 and "nosuch" in answer.json()["error"] and not INSIDES.search(answer.text)
    assert send(daemon, "delete", {"model": "odd"}).status_code == 200
