"""The official `openai` client against a real daemon with a real model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.server.daemon import Daemon

MODEL = "smollm2"
SKY = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def api(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat(api: openai.OpenAI) -> None:
    made = api.chat.completions.create(model=MODEL, messages=SKY, temperature=0, max_tokens=6)  # type: ignore[arg-type]
    (choice,) = made.choices
    assert made.object == "chat.completion" and made.model == MODEL and made.id.startswith("chatcmpl-")
    assert choice.finish_reason == "length" and choice.message.role == "assistant" and choice.message.content
    assert made.usage is not None and (made.usage.completion_tokens, made.usage.total_tokens) == (6, 42)
    newer = api.chat.completions.create(model=MODEL, messages=SKY, temperature=0, max_completion_tokens=2)  # type: ignore[arg-type]
    assert newer.usage is not None and newer.usage.completion_tokens == 2


def test_streaming(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=MODEL, messages=SKY, temperature=0, max_tokens=6).choices[0].message.content  # type: ignore[arg-type]
    with api.chat.completions.create(
        model=MODEL, messages=SKY, temperature=0, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:  # type: ignore[call-overload]
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].delta.role for c in chunks if c.choices][:2] == ["assistant", None]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6


def test_logprobs(api: openai.OpenAI) -> None:
    made = api.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=SKY, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    entries = made.choices[0].logprobs.content
    assert len(entries) == 4 and all(len(entry.top_logprobs) == 2 and entry.bytes for entry in entries)
    text = api.completions.create(model=MODEL, prompt="Hi", temperature=0, max_tokens=4, logprobs=2)
    found = text.choices[0].logprobs
    assert found is not None and found.tokens is not None and "".join(found.tokens) == text.choices[0].text
    assert found.text_offset is not None and found.text_offset[0] == 0 and len(found.text_offset) == 4


def test_completions(api: openai.OpenAI) -> None:
    made = api.completions.create(model=MODEL, prompt="Why is the sky blue?", temperature=0, max_tokens=6)
    assert made.object == "text_completion" and made.choices[0].finish_reason == "length"
    with api.completions.create(model=MODEL, prompt="Why is the sky blue?", temperature=0, max_tokens=6, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == made.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_embeddings(api: openai.OpenAI) -> None:
    asbase64 = api.embeddings.create(model=MODEL, input=["a cat", "a dog"])  # this client asks for base64 by itself
    floats = api.embeddings.create(model=MODEL, input=["a cat", "a dog"], encoding_format="float")
    for one, two in zip(asbase64.data, floats.data, strict=True):
        assert len(one.embedding) == 576 and one.index == two.index
        assert one.embedding == pytest.approx(two.embedding, rel=1e-6)
    small = api.embeddings.create(model=MODEL, input="a cat", dimensions=32).data[0].embedding
    assert len(small) == 32 and math.isclose(math.fsum(x * x for x in small), 1, rel_tol=1e-5)
    assert asbase64.usage.prompt_tokens == 4
    assert len(api.embeddings.create(model=MODEL, input="").data) == 1


def test_models(api: openai.OpenAI) -> None:
    assert "smollm2:latest" in [model.id for model in api.models.list()]
    model = api.models.retrieve(MODEL)
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "library")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("missing")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("someone/missing:v1")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 200}, "n must be between 1 and 128"),
        ({"logit_bias": {"a": 5}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {"99999999": 5}}, "logit_bias: token 99999999 is not in the vocabulary of 49152"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "does not support tools"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"functions": [{"name": "f"}]}, "functions: not supported yet"),
        ({"response_format": {"type": "yaml"}}, "invalid response_format type: 'yaml'"),
        ({"messages": []}, "[] is too short - 'messages'"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "exceeds the available context"),
        ({"temperature": "hot"}, "invalid request: Expected `float"),
    ],
)
def test_refusals(api: openai.OpenAI, fields: dict[str, object], text: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        api.chat.completions.create(**{"model": MODEL, "messages": SKY, **fields})  # type: ignore[call-overload]
    assert text in error.value.message
    assert error.value.type == "invalid_request_error"
    assert error.value.code == ("context_length_exceeded" if "exceeds" in text else None)


def test_missing_model(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        api.chat.completions.create(model="missing", messages=SKY)  # type: ignore[arg-type]
    assert error.value.type == "not_found_error" and "model 'missing' not found" in error.value.message
