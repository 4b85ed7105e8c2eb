"""Model names: grammar, defaults, display, comparison."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy.errors import BadRequest
from ollamapy.names import ModelName, split_source

DEFAULTS = ("registry.ollama.ai", "library", "latest")


@pytest.mark.parametrize(
    ("text", "parts", "short"),
    [
        ("llama3.2", ("registry.ollama.ai", "library", "llama3.2", "latest"), "llama3.2:latest"),
        ("Llama3.2:1B", ("registry.ollama.ai", "library", "Llama3.2", "1B"), "Llama3.2:1B"),
        ("me/x", ("registry.ollama.ai", "me", "x", "latest"), "me/x:latest"),
        ("hf.co/Org-1/M_2.gguf:Q4_K_M", ("hf.co", "Org-1", "M_2.gguf", "Q4_K_M"), "hf.co/Org-1/M_2.gguf:Q4_K_M"),
        ("localhost:5000/ns/m", ("localhost:5000", "ns", "m", "latest"), "localhost:5000/ns/m:latest"),
        ("https://registry.ollama.ai/library/m:t", ("registry.ollama.ai", "library", "m", "t"), "m:t"),
        ("REGISTRY.ollama.ai/Library/m", ("REGISTRY.ollama.ai", "Library", "m", "latest"), "m:latest"),
        ("registry.ollama.ai/me/m", ("registry.ollama.ai", "me", "m", "latest"), "me/m:latest"),
        ("_a:_b", ("registry.ollama.ai", "library", "_a", "_b"), "_a:_b"),
    ],
)
def test_parses(text: str, parts: tuple[str, ...], short: str) -> None:
    name = ModelName.parse(text)
    assert name.parts == parts
    assert name.short() == short
    assert name.given == text
    assert ModelName.parse(short) == name == ModelName.parse(str(name))


def test_scheme_is_kept() -> None:
    assert ModelName.parse("http://localhost/a/b").scheme == "http"
    assert ModelName.parse("localhost/a/b").scheme == "https"


INVALID = [
    *("", ":", "/", "a:", ":a", "/a", "a/", "a//b", "a/b/", "/a/b", "a/b//c", "a:b:c", "a/b/c/d"),
    *("a b", " a", "a ", "a\n", "\n", "a\tb", "a\0b", "a\\b", "C:\\x", "$x", "a?b", "a*", "<a>", "a@sha256:00", "a+b"),
    *(".a", "-a", "a:.b", "a:-b", ".", "..", "../a", "a/..", "a/../b", "../../etc/passwd", "~", "~/a", "./a"),
    *("a.b/m", "x/a.b/m", "-h/n/m", "h/-n/m", ".h/n/m", "h/n/m:", "é", "a:é", "\uff41", "\u0663"),
    *("http://", "http://a", "http://a/b", "ftp://h/n/m", "://h/n/m"),
]


@pytest.mark.parametrize("text", INVALID)
def test_refuses(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^invalid model name$"):
        ModelName.parse(text)


@pytest.mark.parametrize(("part", "limit"), [("{}", 80), ("{}/m", 80), ("m:{}", 80), ("{}/n/m", 350)])
def test_part_lengths(part: str, limit: int) -> None:
    assert ModelName.is_valid(part.format("x" * limit))
    assert not ModelName.is_valid(part.format("x" * (limit + 1)))


def test_comparison_ignores_case_and_scheme() -> None:
    one, two = ModelName.parse("Foo/Bar:Q4_K_M"), ModelName.parse("https://REGISTRY.OLLAMA.AI/foo/bar:q4_k_m")
    assert one == two and hash(one) == hash(two)
    assert one != ModelName.parse("foo/bar")
    assert one != "foo/bar:q4_k_m"


ALNUM = string.ascii_letters + string.digits
part = st.builds(lambda a, b: a + b, st.sampled_from(ALNUM + "_"), st.text(ALNUM + "_-", max_size=20))


@given(part, part, part, part)
def test_any_valid_parts_round_trip(host: str, namespace: str, model: str, tag: str) -> None:
    name = ModelName.parse(f"{host}/{namespace}/{model}:{tag}")
    assert name.parts == (host, namespace, model, tag)
    assert ModelName.parse(name.short()) == name


@given(st.text(alphabet=st.sampled_from(ALNUM + "._-:/@+ \\\n\0é"), max_size=30))
def test_whatever_is_accepted_is_a_safe_relative_path(text: str) -> None:
    if not ModelName.is_valid(text):
        return
    for piece in ModelName.parse(text).parts:
        assert piece and piece[0] not in ".-" and not set(piece) & set("/\\\0\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt-oss", ("gpt-oss", "")),
        ("gpt-oss:20b", ("gpt-oss:20b", "")),
        ("gpt-oss:cloud", ("gpt-oss", "cloud")),
        ("gpt-oss:20b-CLOUD", ("gpt-oss:20b", "cloud")),
        ("gpt-oss:20b:cloud", ("gpt-oss:20b", "cloud")),
        ("me/x:1:Local", ("me/x:1", "local")),
        ("host:5000/n/m", ("host:5000/n/m", "")),
        ("host:5000/n/x-cloud", ("host:5000/n/x-cloud", "")),
        ("cloud", ("cloud", "")),
    ],
)
def test_source_suffix(text: str, expected: tuple[str, str]) -> None:
    assert split_source(text) == expected


@pytest.mark.parametrize("text", ["a:cloud:local", "a:local:cloud", "a:1-cloud:local"])
def test_both_sources(text: str) -> None:
    with pytest.raises(BadRequest, match="use either :local or :cloud, not both"):
        split_source(text)
