"""`run`: one answer to a prompt, a vector from an embedding model, or the REPL."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ollamapy.api.client import Client
from ollamapy.api.types import EmbedRequest, ModelRequest, ShowResponse
from ollamapy.cli.answer import AnswerView, show_answer, waiting
from ollamapy.cli.session import Session
from ollamapy.env import Settings, parse_duration
from ollamapy.errors import BadRequest, NotFound


@dataclass(frozen=True)
class EmbedFlags:
    """`truncate` None leaves it to the server."""

    truncate: bool | None = None
    dimensions: int = 0


def run(client: Client, settings: Settings, session: Session, words: Sequence[str], embed: EmbedFlags) -> None:
    """Answers the words; without any, goes into the REPL on a terminal, or else only loads the model."""
    prompt = " ".join(words)
    info = _show(client, session.model)
    if "embedding" in info.capabilities and "completion" not in info.capabilities:
        _embed(client, session, prompt, embed)
        return
    if session.think and "thinking" not in info.capabilities:
        print(f'warning: model "{session.model}" does not support thinking output', file=sys.stderr)
    else:
        session.think_as(info)
    if not words and on_terminal() and sys.stdout.isatty():
        from ollamapy.cli.repl import Repl

        with waiting():
            client.load(session.model, session.keep_alive)
        Repl(client, settings, session).run(info)
    elif prompt:
        view = AnswerView(sys.stdout, word_wrap=session.word_wrap, hide_thinking=session.hide_thinking)
        show_answer(client.generate(session.generate_request(prompt)), view, verbose=session.verbose)
    else:
        client.load(session.model, session.keep_alive)


def on_terminal() -> bool:
    """Whether somebody types."""
    return sys.stdin is not None and sys.stdin.isatty()


def piped_input() -> list[str]:
    """All of stdin when it is no terminal, unless it is nothing but blanks."""
    if sys.stdin is None or on_terminal():
        return []
    text = sys.stdin.buffer.read().decode(errors="replace")
    return [text] if text.strip() else []


def parse_format(text: str) -> Any:
    """The value of --format: "json" or a JSON schema. Raises BadRequest."""
    if text in ("", "json"):
        return text or None
    try:
        schema = msgspec.json.decode(text)
    except msgspec.DecodeError:
        schema = None
    if not isinstance(schema, dict):
        raise BadRequest(f'invalid format: {text}; expected "json" or a valid JSON Schema object')
    return schema


def parse_keep_alive(text: str) -> str | None:
    """The value of --keepalive, a Go duration. Raises BadRequest."""
    if not text:
        return None
    try:
        parse_duration(text)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return text


def _show(client: Client, model: str) -> ShowResponse:
    try:
        return client.show(ModelRequest(model=model))
    except NotFound as error:
        raise NotFound(f"{error}; pulling models is not supported yet, `ollamapy create` makes one from a GGUF file") from None


def _embed(client: Client, session: Session, prompt: str, flags: EmbedFlags) -> None:
    if not prompt:
        raise BadRequest(f'embedding models require input text. Usage: ollamapy run {session.model} "your text here"')
    request = EmbedRequest(
        model=session.model,
        input=prompt,
        keep_alive=session.keep_alive,
        dimensions=flags.dimensions,
        truncate=flags.truncate is not False,
    )
    with waiting():
        found = client.embed(request)
    if not found.embeddings:
        raise BadRequest("no embeddings were returned")
    print(msgspec.json.encode(found.embeddings[0]).decode())
