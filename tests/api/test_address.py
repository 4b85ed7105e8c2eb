"""OLLAMA_HOST in all the forms that people write."""

from __future__ import annotations

import pytest

from ollamapy.api.address import Address


@pytest.mark.parametrize(
    ("text", "scheme", "host", "port", "url"),
    [
        ("", "http", "127.0.0.1", 11434, "http://127.0.0.1:11434"),
        ("1.2.3.4", "http", "1.2.3.4", 11434, "http://1.2.3.4:11434"),
        (" '1.2.3.4:80' ", "http", "1.2.3.4", 80, "http://1.2.3.4:80"),
        (":8080", "http", "", 8080, "http://127.0.0.1:8080"),
        ("0.0.0.0", "http", "0.0.0.0", 11434, "http://127.0.0.1:11434"),
        ("[::]:5", "http", "::", 5, "http://[::1]:5"),
        ("::1", "http", "::1", 11434, "http://[::1]:11434"),
        ("[::1]", "http", "::1", 11434, "http://[::1]:11434"),
        ("example.com", "http", "example.com", 11434, "http://example.com:11434"),
        ("http://example.com", "http", "example.com", 80, "http://example.com:80"),
        ("https://example.com", "https", "example.com", 443, "https://example.com:443"),
        ("https://example.com:1234/a/b/", "https", "example.com", 1234, "https://example.com:1234/a/b"),
        ("example.com/ollama", "http", "example.com", 11434, "http://example.com:11434/ollama"),
        ("ollama.com", "https", "ollama.com", 443, "https://ollama.com:443"),
        ("http://ollama.com", "http", "ollama.com", 80, "http://ollama.com:80"),
        ("h:99999", "http", "h", 11434, "http://h:11434"),
        ("h:-1", "http", "h", 11434, "http://h:11434"),
        ("http://h:x", "http", "h", 80, "http://h:80"),
        ("h:0", "http", "h", 0, "http://h:0"),
    ],
)
def test_parse(text: str, scheme: str, host: str, port: int, url: str) -> None:
    address = Address.parse(text)
    assert (address.scheme, address.host, address.port, address.url) == (scheme, host, port, url)


@pytest.mark.parametrize(("text", "loopback"), [
    ("", True), ("127.8.8.8", True), ("localhost:1", True), ("[::1]:1", True),
    ("0.0.0.0", False), (":80", False), ("192.168.1.2", False), ("example.com", False), ("[::]", False),
])  # fmt: skip
def test_is_loopback(text: str, loopback: bool) -> None:
    assert Address.parse(text).is_loopback is loopback
