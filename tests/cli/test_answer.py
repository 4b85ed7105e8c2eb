"""How an answer looks on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from ollamapy.api.types import GenerateResponse
from ollamapy.cli.answer import AnswerView, notice, timings


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, *pieces: tuple[str, str], hide_thinking: bool = False) -> str:
    view = AnswerView(out, word_wrap=True, hide_thinking=hide_thinking)
    for content, thinking in pieces:
        view.feed(content, thinking)
    view.end()
    return out.getvalue()


THOUGHT = (("", "Let me "), ("", "see."), ("An ", ""), ("answer.", ""))


def test_thinking_is_set_apart() -> None:
    assert shown(io.StringIO(), *THOUGHT) == "Thinking...\nLet me see.\n...done thinking.\n\nAn answer.\n\n"


def test_thinking_is_grey_on_a_terminal() -> None:
    text = shown(Screen(), *THOUGHT)
    assert text.index("\x1b[38;5;245m") < text.index("Let me") < text.rindex("\x1b[0m") < text.index("An answer.")


def test_hidden_thinking() -> None:
    assert shown(io.StringIO(), *THOUGHT, hide_thinking=True) == "An answer.\n\n"


def test_thinking_that_is_stopped_is_closed() -> None:
    assert shown(io.StringIO(), ("", "Let me\n")) == "Thinking...\nLet me\n...done thinking.\n\n\n\n"


def test_nothing_said_shows_nothing() -> None:
    assert shown(io.StringIO()) == ""


def test_a_model_cannot_send_control_codes_to_a_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x9b2Jc\rd\te\n"
    assert shown(Screen(), (evil, "")) == "a]0;titleb2Jcd\te\n\n\n"
    assert shown(io.StringIO(), (evil, "")) == evil + "\n\n"


def test_lines_are_wrapped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "15")
    assert "\n" in shown(Screen(), ("one two three four", "")).rstrip("\n")
    assert shown(io.StringIO(), ("one two three four", "")) == "one two three four\n\n"


def test_timings() -> None:
    reply = GenerateResponse(
        model="m",
        created_at="",
        done=True,
        response="",
        total_duration=1_500_000_000,
        load_duration=2_000_000,
        prompt_eval_count=26,
        prompt_eval_duration=130_000_000,
        eval_count=100,
        eval_duration=1_250_000_000,
    )
    assert timings(reply).splitlines() == [
        "total duration:       1.5s",
        "load duration:        2ms",
        "prompt eval count:    26 token(s)",
        "prompt eval duration: 130ms",
        "prompt eval rate:     200.00 tokens/s",
        "eval count:           100 token(s)",
        "eval duration:        1.25s",
        "eval rate:            80.00 tokens/s",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    assert timings(GenerateResponse(model="m", created_at="", done=True, response="", eval_count=3)) == (
        "eval count:           3 token(s)\n"
    )


def test_a_cut_prompt_is_said() -> None:
    reply = GenerateResponse(model="m", created_at="", done=True, response="", prompt_eval_count=100)
    assert notice(reply) == ""
    reply.truncated, reply.prompt_tokens_total = True, 300
    assert notice(reply) == "warning: the prompt was cut from 300 to 100 tokens to fit the context\n"
