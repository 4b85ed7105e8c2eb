"""The client against servers that answer in every way a server can: real sockets, canned bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ollamapy import errors
from ollamapy.api.address import Address
from ollamapy.api.client import Client
from ollamapy.api.types import ChatRequest, GenerateRequest


@contextmanager
def answering(*parts: bytes) -> Iterator[tuple[Client, list[bytes]]]:
    """A client of a server that reads one request, sends `parts` one by one and closes; and what it read."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                data = b""
                while b"\r\n\r\n" not in data or not _complete(data):
                    data += connection.recv(1 << 16)
                received.append(data)
                for part in parts:
                    connection.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(Address("http", "127.0.0.1", listener.getsockname()[1])) as client:
            yield client, received
        thread.join()


def _complete(request: bytes) -> bool:
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return not lengths or len(body) >= int(lengths[0].split(b":")[1])


def response(body: bytes, status: str = "200 OK", *headers: bytes) -> bytes:
    head = [f"HTTP/1.1 {status}".encode(), b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


LINE = '{{"model":"m","created_at":"","response":"{}","done":{}}}\n'


def lines(*texts: str) -> bytes:
    return "".join(LINE.format(text, "false") for text in texts).encode() + LINE.format("", "true").encode()


def test_lines_arrive_whole_however_they_are_cut() -> None:
    body = lines("a\u2028b\u0085", "日本") + b"\n"
    cuts = [response(body)[at : at + 1] for at in range(len(response(body)))]
    with answering(*cuts) as (client, _):
        replies = list(client.generate(GenerateRequest(model="m", prompt="x")))
    assert [reply.response for reply in replies] == ["a\u2028b\u0085", "日本", ""]
    assert [reply.done for reply in replies] == [False, False, True]


def test_an_error_line_ends_the_stream() -> None:
    with answering(response(lines("a") + b'{"error":"the engine died"}\n')) as (client, _):
        stream = client.generate(GenerateRequest(model="m"))
        assert next(stream).response == "a"
        next(stream)
        with pytest.raises(errors.OllamapyError, match="the engine died"):
            next(stream)


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        ("400 Bad Request", b'{"error":"no"}', errors.BadRequest, "no"),
        ("403 Forbidden", b"", errors.Forbidden, "403 Forbidden"),
        ("404 Not Found", b'{"error":"model \'m\' not found"}', errors.NotFound, "model 'm' not found"),
        ("404 Not Found", b"404 page not found", errors.NotFound, "404 page not found"),
        ("500 Internal Server Error", b'{"error":"x"}', errors.OllamapyError, "x"),
        ("501 Not Implemented", b'{"error":"later"}', errors.NotSupported, "later"),
        ("401 Unauthorized", b'{"error":{"message":"key"}}', errors.Unauthorized, "{'message': 'key'}"),
    ],
)
def test_statuses_are_errors(status: str, body: bytes, kind: type[errors.OllamapyError], text: str) -> None:
    for call in (lambda c: c.tags(), lambda c: list(c.chat(ChatRequest(model="m")))):
        with answering(response(body, status)) as (client, _), pytest.raises(errors.OllamapyError) as caught:
            call(client)
        assert type(caught.value) is kind and str(caught.value) == text


def test_a_busy_server_says_when_to_come_back() -> None:
    with answering(response(b'{"error":"busy"}', "503 Service Unavailable", b"Retry-After: 7")) as (client, _):
        with pytest.raises(errors.ServerBusy) as caught:
            client.load("m")
        assert caught.value.retry_after == 7


def test_what_is_not_json_is_an_error() -> None:
    with answering(response(b"<html>")) as (client, _), pytest.raises(errors.OllamapyError, match="cannot be read"):
        client.tags()
    with answering(response(b'{"models":3}')) as (client, _), pytest.raises(errors.OllamapyError, match="cannot be read"):
        client.tags()


def test_a_connection_that_breaks() -> None:
    with answering(response(lines("a"))[:-30]) as (client, _):
        stream = client.generate(GenerateRequest(model="m"))
        assert next(stream).response == "a"
        with pytest.raises(errors.Unreachable, match=r"the connection to http://127\.0\.0\.1:\d+ failed"):
            list(stream)


def test_nobody_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with Client(Address("http", "127.0.0.1", bound.getsockname()[1])) as client:
            with pytest.raises(errors.Unreachable, match="could not connect to ollamapy server, run 'ollamapy serve'"):
                client.version()
            with pytest.raises(errors.Unreachable):
                next(client.generate(GenerateRequest(model="m")))


def test_requests_say_only_what_was_set() -> None:
    with answering(response(b'{"model":"m","created_at":"","response":"","done":true}')) as (client, received):
        client.load("m", keep_alive=0)
    head, _, body = received[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/generate HTTP/1.1\r\n") and b"user-agent: ollamapy/" in head.lower()
    assert body == b'{"model":"m","stream":false,"keep_alive":0}'


def test_a_path_before_the_api() -> None:
    with answering(response(b'{"version":"1"}')) as (client, received):
        address = Address("http", "127.0.0.1", client.address.port, "behind/proxy")
        with Client(address) as other:
            assert other.version() == "1"
    assert received[0].startswith(b"GET /behind/proxy/api/version HTTP/1.1\r\n")


def test_loopback_needs_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with answering(response(b'{"version":"1"}')) as (client, _):
        assert client.version() == "1"
    with Client(Address("http", "ollama.invalid", 80)) as client, pytest.raises(errors.Unreachable):
        client.version()


def test_an_upload_is_sent_in_pieces_with_its_length(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(data)
    seen: list[tuple[int, int]] = []
    with answering(response(b"", "201 Created")) as (client, received):
        client.upload_blob("sha256:ab", tmp_path / "file", lambda done, total: seen.append((done, total)))
    head, _, body = received[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/blobs/sha256:ab ") and body == data
    assert b"transfer-encoding" not in head.lower()
    assert seen[-1] == (len(data), len(data)) and len(seen) == 3
