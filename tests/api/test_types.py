"""Requests are decoded as Ollama's clients expect; responses leave out what Ollama leaves out."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ollamapy.api.decode import MAX_DEPTH, decode, lifetime
from ollamapy.api.messages import AnswerMessage
from ollamapy.api.types import (
    ChatRequest,
    ChatResponse,
    CreateRequest,
    Details,
    EmbedRequest,
    GenerateRequest,
    GenerateResponse,
    Logprob,
    ModelRequest,
    TokenLogprob,
)
from ollamapy.errors import BadRequest


def test_unknown_fields_and_nulls_are_passed_over() -> None:
    body = b"""{"model": "m", "stream": null, "options": null, "tools": null, "keep_alive": null, "format": "", "new": [1],
                "messages": [{"role": "User", "content": null, "images": null, "tool_calls": null, "thinking": null}]}"""
    request = decode(body, ChatRequest)
    assert request.stream and request.options == {} and request.tools == [] and request.format == ""
    (message,) = request.messages
    assert (message.role, message.content, message.thinking) == ("user", "", "")


def test_a_null_inside_what_is_the_users_own_stays() -> None:
    body = b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{"a":null}}}]}]}'
    (message,) = decode(body, ChatRequest).messages
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == {"a": None}


def test_arguments_keep_their_order() -> None:
    names = [f"k{n}" for n in (3, 1, 2, 11, 0)]
    arguments = msgspec.json.encode(dict.fromkeys(names, 1)).decode()
    body = f'{{"messages":[{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{arguments}}}}}]}}]}}'
    calls = decode(body.encode(), ChatRequest).messages[0].tool_calls
    assert calls is not None and list(calls[0].function.arguments) == names


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b"{", "invalid request: "),
        (b"[]", "invalid request: "),
        (b'"x"', "invalid request: "),
        (b'{"model": 3}', "invalid request: Expected `str`, got `int` - at `$.model`"),
        (b'{"model": "\xff"}', "invalid request: "),
        (b'{"stream": "yes"}', "invalid request: Expected `bool`"),
        (b'{"context": ["a"]}', "invalid request: Expected `int`"),
        (b'{"options": []}', "invalid request: Expected `object`"),
        (b'{"top_logprobs": 21}', "top_logprobs must be between 0 and 20"),
        (b'{"top_logprobs": -1}', "top_logprobs must be between 0 and 20"),
        (b'{"think": "very"}', 'invalid think value: "very"'),
        (b'{"think": 1}', "invalid request: "),
        (b'{"keep_alive": true}', "Unsupported type: 'bool'"),
        (b'{"keep_alive": [1]}', "Unsupported type: 'array'"),
        (b'{"keep_alive": {"a": 1}}', "Unsupported type: 'object'"),
        (b'{"keep_alive": "10"}', 'time: invalid duration "10"'),
        (b'{"keep_alive": "soon"}', 'time: invalid duration "soon"'),
        (b"[" * 100_000, "invalid request: "),
        (b'{"format":' * 5000 + b"1" + b"}" * 5000, "invalid request: "),
        (b'{"format":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"invalid request: nested deeper than {MAX_DEPTH}"),
    ],
)
def test_bad_bodies(body: bytes, text: str) -> None:
    with pytest.raises(BadRequest) as error:
        decode(body, GenerateRequest)
    assert str(error.value).startswith(text)


def test_messages_content_must_be_text() -> None:
    with pytest.raises(BadRequest, match=r"\$\.messages\[0\]\.content"):
        decode(b'{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]}', ChatRequest)
    with pytest.raises(BadRequest, match="arguments"):
        decode(b'{"messages":[{"role":"a","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}', ChatRequest)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (0, 0.0),
        ("0", 0.0),
        ("0s", 0.0),
        (-1, math.inf),
        (-0.5, math.inf),
        ("-1m", math.inf),
        (1.5, 1.5),
        (90, 90.0),
        ("250ms", 0.25),
        ("1h30m", 5400.0),
        ("10m", 600.0),
    ],
)
def test_keep_alive(given: object, seconds: float | None) -> None:
    assert lifetime(given) == seconds


def test_name_and_model_both_name_a_model() -> None:
    assert decode(b'{"name":"a"}', ModelRequest).target == "a"
    assert decode(b'{"model":"b","name":"a"}', ModelRequest).target == "b"
    assert decode(b'{"name":"a","from":"c"}', CreateRequest).base == "c"


def encoded(value: object) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(value), type=dict[str, Any])


def test_lines_of_an_answer_leave_out_what_is_not_there() -> None:
    line = GenerateResponse(model="m", created_at="t", done=False, response="")
    assert encoded(line) == {"model": "m", "created_at": "t", "done": False, "response": ""}
    last = GenerateResponse(
        model="m", created_at="t", done=True, response="", done_reason="stop", eval_count=3, context=[1], total_duration=5
    )
    assert encoded(last) == {
        **encoded(line), "done": True, "done_reason": "stop", "eval_count": 3, "context": [1], "total_duration": 5
    }  # fmt: skip
    chat = ChatResponse(model="m", created_at="t", done=True, message=AnswerMessage(role="assistant", content=""))
    assert encoded(chat)["message"] == {"role": "assistant", "content": ""}


def test_logprobs_have_their_alternatives_only_if_asked() -> None:
    alone = Logprob(token="é", logprob=-0.5, bytes=[195, 169])
    assert encoded(alone) == {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    other = TokenLogprob(token="e", logprob=-1.0, bytes=[101])
    assert encoded(Logprob(token="e", logprob=0.0, bytes=[101], top_logprobs=[other]))["top_logprobs"] == [encoded(other)]


def test_details_are_always_whole() -> None:
    made = Details(parent_model="", format="gguf", family="", families=None, parameter_size="", quantization_level="")
    assert set(encoded(made)) == {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}


def test_a_request_that_we_send_says_only_what_was_set() -> None:
    assert encoded(EmbedRequest(model="m", input=["x"])) == {"model": "m", "input": ["x"]}
    assert encoded(GenerateRequest(model="m", stream=False)) == {"model": "m", "stream": False}
