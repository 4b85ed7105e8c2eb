"""No web page drives the daemon: Host and Origin on raw sockets, over every route there is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ollamapy.api.address import Address
from ollamapy.server.app import routes
from ollamapy.server.middleware import HostPolicy, OriginPolicy
from tests.server.daemon import Daemon, connect, read_head, request_bytes

GOOD_HOSTS = [
    "localhost", "LOCALHOST:11434", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:11434", "0.0.0.0:1", "192.168.1.5",
    "10.0.0.1:9", "a.localhost", "host.docker.internal", "printer.local:5", "localhost.", socket.gethostname(),
]  # fmt: skip
BAD_HOSTS = [
    "-", "", "evil.com", "evil.com:11434", "localhost.evil.com", "127.0.0.1.evil.com", "8.8.8.8", "[2001:4860::8888]", "ollama",
    "localhost@evil.com", "evil.com#localhost", "localhost:evil", "[::1", "local host", "xlocalhost", ".local", "internal", "1",
    "0x7f.1", "127.1", "evil.com/localhost",
]  # fmt: skip
GOOD_ORIGINS = [
    "-", "http://localhost", "http://localhost:3000", "https://127.0.0.1", "https://127.0.0.1:8443", "http://0.0.0.0:1",
    "app://obsidian.md", "tauri://localhost", "vscode-webview://abc", "vscode-file://x",
]  # fmt: skip
BAD_ORIGINS = [
    "http://evil.com", "https://evil.com:11434", "null", "file://", "http://localhost.evil.com", "http://localhost:1.evil.com",
    "http://localhost:@evil.com", "http://127.0.0.1.evil.com", "chrome-extension://abc", "", "http://localhost:x", "localhost",
    "http://localhost/", "ftp://localhost", "http://192.168.1.5",
]  # fmt: skip


def endpoints() -> Iterator[tuple[str, str]]:
    for route in routes():
        path = route.path.replace("{digest}", "sha256:" + "0" * 64).replace("{model:path}", "missing")
        for method in sorted(route.methods or ()):
            yield method, path


@pytest.mark.parametrize(("method", "path"), list(endpoints()))
def test_no_handler_is_reached(bare_daemon: Daemon, method: str, path: str) -> None:
    """{} would be an error of the handler's own: 400, 404 or 501."""
    pairs = [(host, "-") for host in BAD_HOSTS] + [("localhost", origin) for origin in BAD_ORIGINS]
    pairs += [(BAD_HOSTS[n % len(BAD_HOSTS)], origin) for n, origin in enumerate(GOOD_ORIGINS + BAD_ORIGINS)]
    for content_type in ("application/json", "text/plain"):
        with connect(bare_daemon) as sock:
            for host, origin in pairs:
                headers = {"Host": host, "Origin": origin, "Content-Type": content_type}
                sock.sendall(request_bytes(method, path, {}, headers))
                status, answered, rest = read_head(sock)
                assert (status, rest) == (403, b""), (host, origin, status, rest)
                assert "access-control-allow-origin" not in answered


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_allowed(bare_daemon: Daemon, host: str) -> None:
    with connect(bare_daemon) as sock:
        for origin in GOOD_ORIGINS:
            sock.sendall(request_bytes("HEAD", "/api/version", headers={"Host": host, "Origin": origin}))
            status, headers, _ = read_head(sock)
            assert status == 200, (host, origin)
            assert headers.get("access-control-allow-origin") == (None if origin == "-" else origin)
            assert origin == "-" or headers["vary"] == "Origin"


def test_simple_requests_of_allowed_pages_must_still_be_json(bare_daemon: Daemon) -> None:
    """What a browser sends without asking: text/plain, a form, nothing."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "-"):
        with connect(bare_daemon) as sock:
            headers = {"Origin": "http://localhost", "Content-Type": content_type}
            sock.sendall(request_bytes("POST", "/api/show", {}, headers))
            assert read_head(sock)[0] == 415
    with connect(bare_daemon) as sock:
        headers = {"Origin": "http://localhost", "Content-Type": "application/json; charset=utf-8"}
        sock.sendall(request_bytes("POST", "/api/show", {}, headers))
        assert read_head(sock)[0] == 400


def test_two_hosts_or_origins_are_none(bare_daemon: Daemon) -> None:
    for name, good in (("Host", "localhost"), ("Origin", "http://localhost")):
        with connect(bare_daemon) as sock:
            request = request_bytes("GET", "/api/version", headers={name: good})
            sock.sendall(request.replace(b"\r\n", b"\r\n%s: %s\r\n" % (name.encode(), good.encode()), 1))
            assert read_head(sock)[0] == 403


def test_requests_of_other_sites_without_origin(bare_daemon: Daemon) -> None:
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        with connect(bare_daemon) as sock:
            sock.sendall(request_bytes("HEAD", "/api/tags", headers={"Sec-Fetch-Site": site}))
            assert read_head(sock)[0] == status


def test_preflight(bare_daemon: Daemon) -> None:
    def preflight(origin: str) -> tuple[int, dict[str, str]]:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
        with connect(bare_daemon) as sock:
            sock.sendall(request_bytes("OPTIONS", "/api/chat", headers=asked))
            status, headers, _ = read_head(sock)
        return status, headers

    status, headers = preflight("http://localhost:3000")
    assert status == 204 and headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "POST" in headers["access-control-allow-methods"]
    assert {"Authorization", "x-stainless-runtime-version"} <= set(headers["access-control-allow-headers"].split(","))
    assert headers["access-control-allow-private-network"] == "true"
    status, headers = preflight("https://evil.com")
    assert status == 403 and not any(name.startswith("access-control") for name in headers)


def test_a_page_of_our_own_is_allowed(bare_daemon: Daemon) -> None:
    with connect(bare_daemon) as sock:
        headers = {"Host": "192.168.1.5:11434", "Origin": "http://192.168.1.5:11434"}
        sock.sendall(request_bytes("HEAD", "/api/version", headers=headers))
        assert read_head(sock)[0] == 200


@pytest.mark.parametrize("text", ["0.0.0.0", ":11434", "192.168.1.2"])
def test_hosts_beyond_loopback(text: str) -> None:
    """The network may reach us by address and by names that no public DNS gives; a public name may not."""
    policy = HostPolicy(Address.parse(text))
    for host in ("8.8.8.8:1", "[2001:db8::1]", "ollama:11434", "localhost", "my_container", "nas.local"):
        assert policy.allows(host), host
    for host in ("evil.com", "ollama.evil.com:11434", "", "1"):
        assert not policy.allows(host), host
    assert HostPolicy(Address.parse("models.example.com:80")).allows("MODELS.example.com:80")


def test_configured_origins() -> None:
    policy = OriginPolicy(["chrome-extension://*", "https://*.example.com", "http://192.168.1.5:*", "https://one.com"])
    for origin in ("chrome-extension://abcdef", "https://a.example.com", "http://192.168.1.5:3000", "https://one.com"):
        assert policy.allows(origin, "localhost"), origin
    for origin in ("https://example.com", "http://a.example.com", "https://a.example.com.evil.com", "https://one.com.evil.com"):
        assert not policy.allows(origin, "localhost"), origin
    assert OriginPolicy(["*"]).any and OriginPolicy(["*"]).allows("https://evil.com", "localhost")
