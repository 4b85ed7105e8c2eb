"""The state of a conversation, and the forms of what is typed."""

from __future__ import annotations

import msgspec
import pytest

from ollamapy.api.messages import Message
from ollamapy.api.types import Details, ShowResponse
from ollamapy.cli.run import parse_format, parse_keep_alive
from ollamapy.cli.session import Session, is_open, parse_think, unquoted
from ollamapy.errors import BadRequest, OptionError


def info(*capabilities: str) -> ShowResponse:
    details = Details(parent_model="", format="", family="", families=None, parameter_size="", quantization_level="")
    return ShowResponse(details=details, model_info={}, capabilities=list(capabilities), modified_at="")


def test_a_new_session_asks_for_nothing_special() -> None:
    session = Session("m")
    session.say("hi")
    assert msgspec.to_builtins(session.chat_request()) == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert msgspec.to_builtins(session.generate_request("hi")) == {"model": "m", "prompt": "hi"}


def test_requests_carry_the_settings() -> None:
    session = Session("m", system="Be brief.", format="json", think="low", keep_alive="5m")
    session.set_parameter("temperature", ["0"])
    session.set_parameter("stop", ["a", "b c"])
    session.say("hi")
    body = msgspec.to_builtins(session.chat_request())
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["options"] == {"temperature": 0.0, "stop": ["a", "b c"]}
    assert (body["format"], body["think"], body["keep_alive"]) == ("json", "low", "5m")
    assert msgspec.to_builtins(session.generate_request("x"))["system"] == "Be brief."


def test_clear_keeps_the_system_message() -> None:
    session = Session("m", system="s")
    session.say("hi")
    session.answered("there", "")
    session.clear()
    assert [message.role for message in session.chat_request().messages] == ["system"]


def test_an_answer_without_text_leaves_no_trace() -> None:
    session = Session("m")
    session.say("hi")
    session.answered("", "")
    assert [message.role for message in session.messages] == ["user"]
    session.take_back()
    assert session.messages == []


def test_switching_the_model_forgets_the_messages() -> None:
    session = Session("m", think=True, options={"seed": 1})
    session.say("hi")
    session.switch("other", info("completion"))
    assert (session.model, session.messages, session.think, session.options) == ("other", [], None, {"seed": 1})
    session.switch("thinker", info("completion", "thinking"))
    assert session.think is True


def test_thinking_switched_off_stays_off() -> None:
    session = Session("m", think=False)
    session.think_as(info("completion", "thinking"))
    assert session.think is False


def test_saving_takes_the_stored_messages_along() -> None:
    session = Session("m", system="s", options={"stop": ("x",), "seed": 1})
    stored = [Message("user", "before"), Message("assistant", "yes")]
    assert session.create_request("n", stored).messages == []  # inherited with the model's layers
    session.say("hi")
    session.answered("hello", "hm")
    body = msgspec.to_builtins(session.create_request("n", stored))
    assert body["from"] == "m" and body["system"] == "s" and body["parameters"] == {"stop": ["x"], "seed": 1}
    assert [message["content"] for message in body["messages"]] == ["before", "yes", "hi", "hello"]


def test_a_bad_parameter_changes_nothing() -> None:
    session = Session("m")
    for name, value in (("temperature", "warm"), ("nonsense", "1")):
        with pytest.raises(OptionError):
            session.set_parameter(name, [value])
    assert session.options == {}


@pytest.mark.parametrize(
    ("text", "open"),
    [
        ("hello", False),
        ('what does """ mean', False),
        ('"""', True),
        ('"""one', True),
        ('"""one\ntwo', True),
        ('"""one\ntwo"""', False),
        ('"""one\ntwo"""  ', False),
        ('"""one""" and', True),
        ('""""""', False),
        ('  """x', True),
        ('/set system """be', True),
        ('/set system """be\nbrief"""', False),
        ('/set  system be """', False),
        ('/show """', False),
    ],
)
def test_is_open(text: str, open: bool) -> None:
    assert is_open(text) is open


def test_unquoted() -> None:
    assert unquoted('"""one\n  two"""') == "one\n  two"
    assert unquoted('"""\none\n"""\n') == "one"
    assert unquoted("  plain ") == "  plain "
    assert unquoted('""""""') == ""


def test_parse_think() -> None:
    assert [parse_think(text) for text in ("", "true", "false", "max")] == [True, True, False, "max"]
    with pytest.raises(BadRequest, match="must be true, false"):
        parse_think("very")


def test_parse_format() -> None:
    assert parse_format("") is None and parse_format("json") == "json"
    assert parse_format('{"type": "object"}') == {"type": "object"}
    for text in ("yaml", "[1]", '"json'):
        with pytest.raises(BadRequest, match="invalid format"):
            parse_format(text)


def test_parse_keep_alive() -> None:
    assert parse_keep_alive("") is None
    assert parse_keep_alive("1h30m") == "1h30m" and parse_keep_alive("-1s") == "-1s"
    with pytest.raises(BadRequest, match='invalid duration "5"'):
        parse_keep_alive("5")
