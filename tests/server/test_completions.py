"""/v1/completions as evaluation tools use it: token ids, echo, prompt logprobs; and n, logit_bias, samplers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.daemon import Daemon

MODEL = "smollm2"
IDS = [
    504,
    3139,
    282,
    4649,
    314,
    7042,
    30,
    378,
    3139,
    282,
    9519,
    314,
]  # "The capital of France is Paris. The capital of Germany is"


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=60) as made:
        yield made


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": MODEL, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_echo_gives_the_logprobs_of_generation(client: httpx.Client) -> None:
    """Bit for bit: what was generated and is then sent as a prompt has the same logprobs, whatever the chunks."""
    made = complete(client, prompt=IDS, max_tokens=8, logprobs=2)["choices"][0]
    text, told = made["text"], made["logprobs"]
    assert len(told["tokens"]) == 8
    whole = complete(client, prompt=IDS, max_tokens=8, logprobs=2, echo=True)["choices"][0]
    assert whole["text"].endswith(text) and len(whole["text"]) > len(text)
    logprobs = whole["logprobs"]
    assert len(logprobs["tokens"]) == len(IDS) + 8 == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == whole["text"] and logprobs["text_offset"][0] == 0
    assert logprobs["token_logprobs"][-8:] == told["token_logprobs"]
    again = complete(client, prompt=whole["text"], max_tokens=0, logprobs=2, echo=True)["choices"][0]
    assert again["finish_reason"] == "length" and again["text"] == whole["text"]
    if again["logprobs"]["tokens"] == logprobs["tokens"]:
        assert again["logprobs"]["token_logprobs"] == logprobs["token_logprobs"]
        assert again["logprobs"]["top_logprobs"] == logprobs["top_logprobs"]


def test_prompts_side_by_side(client: httpx.Client) -> None:
    """What lm-eval sends: several prompts of token ids, one token, echo. Each choice is what its prompt gives alone."""
    prompts = [IDS, IDS[:5], IDS[3:], list(range(100, 160))]
    fields: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    together = complete(client, prompt=prompts, **fields)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    for choice, ids in zip(together["choices"], prompts, strict=True):
        alone = complete(client, prompt=ids, **fields)["choices"][0]
        assert {**choice, "index": 0} == alone
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        for own, top in list(zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True))[1:]:
            assert own in top.values() and len(top) in (1, 2) and own <= max(top.values())
    assert together["usage"] == {
        "prompt_tokens": sum(map(len, prompts)),
        "completion_tokens": 4,
        "total_tokens": sum(map(len, prompts)) + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_echo_without_logprobs_and_streamed(client: httpx.Client) -> None:
    made = complete(client, prompt="The sky is", max_tokens=3, echo=True)["choices"][0]
    assert made["text"].startswith("The sky is") and made["logprobs"] is None
    whole = complete(client, prompt="The sky is", max_tokens=3, echo=True, logprobs=0)["choices"][0]
    body = {"model": MODEL, "temperature": 0, "prompt": "The sky is", "max_tokens": 3, "echo": True, "logprobs": 0}
    lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"] == made["text"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for part in parts for item in part[name]] == whole["logprobs"][name]


def test_n_choices(daemon: Daemon) -> None:
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0) as api:
        asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "A word"}], "max_tokens": 6}
        made = api.chat.completions.create(**asked, n=4, temperature=1.5, seed=11)
        again = api.chat.completions.create(**asked, n=4, temperature=1.5, seed=11)
        texts = [choice.message.content for choice in made.choices]
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3] and len(set(texts)) > 1
        assert [choice.message.content for choice in again.choices] == texts
        alone = api.chat.completions.create(**asked, temperature=1.5, seed=11)
        assert alone.choices[0].message.content == texts[0], "the first choice is that of n = 1"
        assert made.usage is not None and alone.usage is not None
        assert made.usage.prompt_tokens == alone.usage.prompt_tokens and made.usage.completion_tokens <= 24
        assert made.usage.prompt_tokens_details is not None and made.usage.prompt_tokens_details.cached_tokens == 0
        with api.chat.completions.create(
            **asked, n=3, temperature=1.5, seed=11, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        shown = ["", "", ""]
        for chunk in chunks[:-1]:
            shown[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert shown == texts[:3] and chunks[-1].usage is not None and not chunks[-1].choices


def test_a_prompt_is_computed_once_for_all_choices(daemon: Daemon, client: httpx.Client) -> None:
    """As the engine counts: all of the prompt for the first, and its last token for each other."""
    before = daemon.stats()
    made = complete(client, prompt=list(range(1000, 1200)), n=6, max_tokens=3, temperature=1)
    after = daemon.stats()
    queried, found = (after[name] - before[name] for name in ("prefix_query_tokens", "prefix_hit_tokens"))
    assert (queried, found) == (6 * 200, 5 * 199)
    assert made["usage"]["prompt_tokens"] == 200 and made["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = complete(client, prompt=list(range(1000, 1200)), n=6, max_tokens=3, temperature=1)
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 192}
    lines = [line for line in daemon.log.read_text().splitlines() if "prompt_tokens=1200" in line]
    assert [line.partition("cached_tokens=")[2].split()[0] for line in lines] == [str(5 * 199), str(192 + 5 * 199)], (
        "of all six together"
    )


def test_logit_bias(client: httpx.Client) -> None:
    free = complete(client, prompt=IDS, max_tokens=1, logprobs=1)["choices"][0]
    forced = complete(client, prompt=IDS, max_tokens=3, logit_bias={"504": 100})["choices"][0]
    assert forced["text"] == "TheTheThe" != free["text"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": [10**6]}, "prompt: token 1000000 is not in the vocabulary"),
        ({"prompt": [[1], []]}, "prompt must be a string"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 300, "n": 100}, "more than 2048 choices"),
        ({"prompt": [5] * 9000, "echo": True}, "exceeds the available context"),
    ],
)
def test_refusals(client: httpx.Client, fields: dict[str, Any], text: str) -> None:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1, **fields})
    assert answer.status_code == 400 and text in answer.json()["error"]["message"]


def test_samplers_as_options(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "1 2 3 1 2 3 1 2 3", "raw": True, "stream": False}
    for options in (
        {"mirostat": 2, "mirostat_tau": 3.0},
        {"dry_multiplier": 5.0, "dry_sequence_breakers": ["###"]},
        {"xtc_probability": 1.0},
        {"tfs_z": 0.5},
    ):
        answer = client.post("/api/generate", json={**body, "options": {"num_predict": 4, "seed": 1, **options}})
        assert answer.status_code == 200 and answer.json()["eval_count"] == 4
        assert ("x-ollamapy-warning" in answer.headers) == ("tfs_z" in options)
