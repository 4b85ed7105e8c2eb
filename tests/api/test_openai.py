"""OpenAI's requests and answers, translated: what is honoured, what is refused, and the shapes."""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec
import pytest

from ollamapy.api import openai, openai_responses
from ollamapy.api.decode import decode
from ollamapy.api.messages import AnswerMessage
from ollamapy.api.openai import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from ollamapy.api.openai_responses import ChatStream, CompletionStream
from ollamapy.api.types import (
    ChatRequest,
    ChatResponse,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    Logprob,
    TokenLogprob,
)
from ollamapy.errors import BadRequest, ContextOverflow, EngineError, NotFound, ServerBusy

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": HELLO, **fields}
    return openai.to_chat(decode(msgspec.json.encode(body), ChatCompletionRequest))


def complete(**fields: Any) -> GenerateRequest:
    request = decode(msgspec.json.encode({"model": "m", "prompt": "p", **fields}), CompletionRequest)
    (prompt,) = openai.prompts(request)
    assert isinstance(prompt, str)
    return openai.to_generate(request, prompt)


def test_defaults_are_openais() -> None:
    request = chat()
    assert request.options == {"temperature": 1.0, "top_p": 1.0}
    assert request.stream is False and request.truncate is False and request.think is None


def test_options() -> None:
    request = chat(
        temperature=0,
        top_p=0.5,
        seed=7,
        frequency_penalty=0.1,
        presence_penalty=-0.2,
        stop="END",
        max_tokens=3,
        top_k=5,
        min_p=0.1,
    )
    assert request.options == {
        "temperature": 0.0, "top_p": 0.5, "seed": 7, "frequency_penalty": 0.1, "presence_penalty": -0.2, "stop": ["END"],
        "num_predict": 3, "top_k": 5, "min_p": 0.1,
    }  # fmt: skip
    assert chat(stop=["a", 1, "b"]).options["stop"] == ["a", "b"]
    assert chat(max_tokens=3, max_completion_tokens=9).options["num_predict"] == 9
    assert chat(options={"num_ctx": 64, "temperature": 0.2}).options["temperature"] == 0.2
    assert chat(keep_alive="1m").keep_alive == "1m"
    assert chat(stop=None, seed=None, tools=None, n=None, stream_options=None).options == {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"messages": []}, "[] is too short - 'messages'"),
        ({"functions": [{"name": "f"}]}, "functions: not supported yet"),
        ({"response_format": {"type": "yaml"}}, "invalid response_format type: 'yaml'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format: json_schema needs an object 'schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": []}},
            "response_format: json_schema needs an object 'schema'",
        ),
        ({"modalities": ["text", "audio"]}, "modalities other than text: not supported yet"),
        ({"logit_bias": {"5": -101}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {"-5": 1}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias has more than 1024 entries"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"reasoning_effort": "hardest"}, "invalid reasoning value: 'hardest'"),
        ({"top_logprobs": 30}, "top_logprobs must be between 0 and 20"),
        ({"messages": [{"role": "user"}]}, "invalid message content type: NoneType"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid message content type: int"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "invalid message format"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "invalid message format"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio: audio is not supported yet"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest) as error:
        chat(**fields)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://example.com/a.png", "image URLs are not currently supported, please use base64 encoded data instead"),
        ("data:image/gif;base64,AAAA", "invalid image input"),
        ("data:image/png;base64,*", "invalid image input"),
        (5, "invalid image input"),
        ("data:image/png;base64,AAAA", "image_url: images are not supported yet"),
        ("data:;base64,AAAA", "image_url: images are not supported yet"),
    ],
)
def test_image_urls(url: object, text: str) -> None:
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}):
        with pytest.raises(BadRequest, match=text):
            chat(messages=[{"role": "user", "content": [part]}])


def test_messages() -> None:
    request = chat(
        messages=[
            {"role": "Developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "reasoning": "r",
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ]
    )  # fmt: skip
    assert [(m.role, m.content) for m in request.messages] == [
        ("developer", "d"), ("user", "a"), ("user", "b"), ("assistant", ""), ("tool", "42")
    ]  # fmt: skip
    assistant, tool = request.messages[3:]
    assert assistant.thinking == "r"
    assert assistant.tool_calls is not None and assistant.tool_calls[0].function.arguments == {"x": 1}
    assert (tool.tool_name, tool.tool_call_id) == ("f", "c1")
    call = {"id": "c", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(BadRequest, match="invalid tool call arguments"):
        chat(messages=[{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(("fields", "think"), [
    ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "minimal"}, "low"), ({"reasoning_effort": "high"}, "high"),
    ({"reasoning_effort": "low", "reasoning": {"effort": "xhigh"}}, "max"), ({"reasoning": {}}, None),
])  # fmt: skip
def test_reasoning(fields: dict[str, Any], think: object) -> None:
    assert chat(**fields).think == think


def test_completions() -> None:
    request = complete(prompt=["one"], suffix="s", logprobs=0, max_tokens=5, top_p=0)
    assert (request.prompt, request.suffix, request.logprobs, request.top_logprobs) == ("one", "s", True, 0)
    assert request.options == {"temperature": 1.0, "top_p": 1.0, "num_predict": 5}
    assert complete(logprobs=3).top_logprobs == 3 and not complete().logprobs
    for fields in (
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"prompt": [[]]},
        {"prompt": [True]},
        {"echo": True, "suffix": "s"},
        {"best_of": 2},
        {"logprobs": 21},
        {"logprobs": -1},
        {"stop": ["a", 1]},
    ):
        with pytest.raises(BadRequest):
            complete(**fields)


def test_embeddings_request() -> None:
    def embed(**fields: Any) -> Any:
        return openai.to_embed(decode(msgspec.json.encode({"model": "m", **fields}), EmbeddingRequest)).input

    assert embed(input="") == [""] and embed(input=["a", "b"]) == ["a", "b"]
    for fields in ({}, {"input": []}, {"input": None}, {"input": [1, 2]}, {"input": "x", "encoding_format": "int8"}):
        with pytest.raises(BadRequest):
            embed(**fields)


def line(content: str = "", *, thinking: str = "", done: bool = False, **fields: Any) -> ChatResponse:
    message = AnswerMessage(role="assistant", content=content, thinking=thinking)
    return ChatResponse(model="m", created_at="t", done=done, message=message, **fields)


def plain(value: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_chat_stream() -> None:
    stream = ChatStream("m", include_usage=True)
    last = line(done=True, done_reason="stop", prompt_eval_count=4, prompt_eval_cached_count=3, eval_count=2)
    chunks = plain([c for one in (line(thinking="hm"), line("Hi"), line(" you"), last) for c in stream.feed(one)])
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (stream.id, stream.created, "m", "chat.completion.chunk")
    }
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [
        {"role": "assistant", "content": "", "reasoning": "hm"}, {"content": "Hi"}, {"content": " you"}, {}
    ]  # fmt: skip
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1]["choices"] == [] and all(c["usage"] is None for c in chunks[:-1])
    counts = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert chunks[-1]["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 3}}


def test_an_empty_answer_still_has_its_role() -> None:
    chunks = plain(ChatStream("m").feed(line(done=True, done_reason="length")))
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and "usage" not in chunks[-1]


def logprob(token: str, value: float = -1.0) -> Logprob:
    top = TokenLogprob(token=token, logprob=value, bytes=list(token.encode()))
    return Logprob(token=token, logprob=value, bytes=list(token.encode()), top_logprobs=[top])


def test_logprobs() -> None:
    (chunk,) = plain(ChatStream("m").feed(line("a", logprobs=[logprob("a")])))
    (entry,) = chunk["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "a" and entry["bytes"] == [97] and len(entry["top_logprobs"]) == 1
    (held,) = ChatStream("m").feed(line("", logprobs=[logprob("a")]))
    assert held["choices"][0]["delta"]["content"] == ""
    stream = CompletionStream("m")
    texts = [GenerateResponse(model="m", created_at="t", done=False, response=t, logprobs=[logprob(t)]) for t in ("ab", "c")]
    offsets = [c["choices"][0]["logprobs"]["text_offset"] for one in texts for c in plain(stream.feed(one))]
    assert offsets == [[0], [2]]
    whole = GenerateResponse(model="m", created_at="t", done=True, response="abc", logprobs=[logprob("ab"), logprob("c")])
    made = plain(CompletionStream("m").whole(whole))["choices"][0]["logprobs"]
    assert made == {
        "tokens": ["ab", "c"], "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"ab": -1.0}, {"c": -1.0}], "text_offset": [0, 2]
    }  # fmt: skip


def test_whole_answers() -> None:
    made = plain(ChatStream("m").whole(line("Hi", thinking="hm", done=True, done_reason="repeat", eval_count=2)))
    assert made["object"] == "chat.completion" and made["usage"]["completion_tokens"] == 2
    (choice,) = made["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "reasoning": "hm"}
    assert choice["finish_reason"] == "length" and choice["index"] == 0


def test_embeddings_answer() -> None:
    answer = EmbedResponse(model="m", embeddings=[[0.5, -0.25]], prompt_eval_count=3)
    (entry,) = openai_responses.embeddings(answer, as_base64=True)["data"]
    assert struct.unpack("<2f", base64.b64decode(entry["embedding"])) == (0.5, -0.25)
    whole = openai_responses.embeddings(answer, as_base64=False)
    assert whole["data"][0]["embedding"] == [0.5, -0.25] and whole["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize(("error", "kind", "code"), [
    (BadRequest("x"), "invalid_request_error", None), (NotFound("x"), "not_found_error", None),
    (EngineError("x"), "api_error", None), (ServerBusy("x"), "api_error", None),
    (ContextOverflow(9, 8), "invalid_request_error", "context_length_exceeded"),
])  # fmt: skip
def test_errors(error: Any, kind: str, code: str | None) -> None:
    body = openai.error(error, str(error))["error"]
    assert body == {"message": str(error), "type": kind, "param": None, "code": code}
