"""Structured output: from a request's `format` to the grammar that an engine gets. Checking is done in a child process.

    "json"                       any JSON object
    {a JSON Schema}              what llguidance supports of drafts 4 to 2020-12; the rest is refused by name, not ignored
    {"regex": "[a-z]+"}          ours: a regular expression (Rust's syntax, no look-around) that the whole answer matches
    {"choices": ["yes", "no"]}   ours: one of these texts
    {"lark": "start: ..."}       ours: a grammar in llguidance's dialect of Lark
    {"gbnf": "root ::= ..."}     ours: a grammar in llama.cpp's notation
    {"grammar": "..."}           ours: either of these two

An object with just one of the five keys is ours: as a schema it would allow everything.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ollamapy.chat.thinking import ThinkingParser
from ollamapy.errors import BadRequest
from ollamapy.server.checkers import Checkers, Failed
from ollamapy.server.gbnf_lark import to_lark
from ollamapy.server.record import current

MAX_BYTES = 64 << 10  # of a format, as JSON
MAX_DEPTH = 32
MAX_REMEMBERED = 256
TOGETHER = 4.0  # seconds in which the last of a request's formats must have begun to be checked
FAILED_FOR = 300.0  # seconds; a machine that was busy may have been the reason
_OURS = {"regex": str, "lark": str, "gbnf": str, "grammar": str, "choices": list}
_IS_LARK = re.compile(r"^\s*(%llguidance\b|start\s*:(?!:))", re.MULTILINE)
# llguidance's default is any white space, of which small models write without end. One level of indentation a line break.
LAYOUT = {"whitespace_pattern": r"[ ]|\n[ \t]{0,24}"}
_TOP = '%llguidance {"no_forcing": true}\n'  # tokens are the model's choice where their text is forced


class Answer(NamedTuple):
    """A checked format: one entry of llguidance's list of grammars."""

    entry: dict[str, Any]

    def grammar(self, parser: object) -> str:
        """For an engine. A parser that tells thinking from content lets the thinking be free: it goes on to its closing tag,
        and what follows is the answer."""
        return grammar_text("@answer", [{"name": "answer", **self.entry}], parser)


def grammar_text(body: str, entries: list[dict[str, Any]], parser: object) -> str:
    """An answer of the Lark expression `body`, which may name `entries`, after the thinking that the parser tells from it."""
    start = _after_thinking(parser, body) if isinstance(parser, ThinkingParser) else f"start: {body}"
    return msgspec.json.encode({"grammars": [{"lark_grammar": _TOP + start}, *entries]}).decode()


def _after_thinking(parser: ThinkingParser, body: str) -> str:
    """Follows the parser: inside its thinking from the start, or free to begin with the opening tag."""
    closing = "".join(f"\\x{byte:02x}" for byte in parser.tags.closing.encode())
    opening = msgspec.json.encode(parser.tags.opening).decode()
    thought = "thought SPACES?" if parser.opened else f"(SPACES? {opening} thought SPACES?)?"
    return f"start: {thought} ({body})\nthought[lazy]: /(.|\\n)*{closing}/\nSPACES: /[ \\t\\r\\n]{{1,8}}/"


class Formats:
    """Checks formats and remembers what came of it: for good what llguidance said, for a while what it did not live to say."""

    def __init__(self) -> None:
        self._remembered: OrderedDict[bytes, tuple[Answer | BadRequest, float]] = OrderedDict()  # and until when
        self._checkers = Checkers()

    async def check(self, format: Any) -> Answer | None:
        """None for no format. Raises BadRequest with llguidance's reason when an answer cannot be held to it, ServerBusy."""
        if format in (None, ""):
            return None
        (found,) = await self.check_all([format])
        if isinstance(found, BadRequest):
            raise BadRequest(str(found))  # the one that is remembered would gather tracebacks
        return found

    async def check_all(self, formats: Sequence[Any]) -> list[Answer | BadRequest]:
        """Of each what `check` returns or raises. Those that are new have TOGETHER seconds. Raises ServerBusy."""
        asked = [_asked(format) for format in formats]
        found = [each if isinstance(each, BadRequest) else self._recall(each.key) for each in asked]
        if None in found:
            async with self._checkers.turn(current().caller.client):
                end = time.monotonic() + TOGETHER
                for at, each in enumerate(asked):
                    if found[at] is None and isinstance(each, _Asked):
                        found[at] = self._recall(each.key) or await self._try(each, end)  # perhaps known since its turn came
        return [each for each in found if each is not None]

    async def close(self) -> None:
        await self._checkers.close()

    async def _try(self, asked: _Asked, end: float) -> Answer | BadRequest:
        if time.monotonic() >= end:
            return BadRequest(f"invalid format: those before it took more than {TOGETHER:g} s to compile")
        entries = [{"lark_grammar": f"{_TOP}start: @answer"}, {"name": "answer", **asked.entry}]
        until = math.inf
        try:
            problem = await self._checkers.ask(msgspec.json.encode({"grammars": entries}))
        except Failed as failure:
            problem, until = str(failure), time.monotonic() + FAILED_FOR
        found = BadRequest(f"invalid format: {problem}") if problem else Answer(asked.entry)
        self._remembered[asked.key] = found, until
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _recall(self, key: bytes) -> Answer | BadRequest | None:
        found, until = self._remembered.pop(key, (None, 0.0))
        if found is None or until < time.monotonic():
            return None
        self._remembered[key] = found, until
        return found


class _Asked(NamedTuple):
    key: bytes
    entry: dict[str, Any]


def _asked(format: Any) -> _Asked | BadRequest:
    try:
        return _Asked(hashlib.sha256(_bounded(format)).digest(), _entry(format))
    except BadRequest as error:
        return error


def _bounded(format: Any) -> bytes:
    """The format as JSON. Raises BadRequest for the wrong type, size or depth."""
    text = msgspec.json.encode(format)
    if format != "json" and not isinstance(format, dict):
        shown = text.decode() if len(text) <= 200 else f"{text[:200].decode(errors='ignore')}..."
        raise BadRequest(f'invalid format: {shown}; expected "json" or a valid JSON Schema object')
    if len(text) > MAX_BYTES:
        raise BadRequest(f"invalid format: {len(text)} bytes of JSON, which is more than {MAX_BYTES}")
    level: list[Any] = [format]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _children(value)]
        if not level:
            return text
    raise BadRequest(f"invalid format: nested deeper than {MAX_DEPTH}")


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _entry(format: Any) -> dict[str, Any]:
    """One entry of llguidance's list of grammars. Raises BadRequest."""
    if format == "json":
        return {"json_schema": {"type": "object", "x-guidance": LAYOUT}}
    key = next(iter(format), "")
    if len(format) > 1 or key not in _OURS:
        return {"json_schema": {**format, "x-guidance": LAYOUT}}
    value = format[key]
    if not value or not isinstance(value, _OURS[key]):
        raise BadRequest(f'invalid format: "{key}" must be a {_OURS[key].__name__} that is not empty')
    if key == "lark" or (key == "grammar" and _IS_LARK.search(value)):
        return {"lark_grammar": value}
    if key in ("gbnf", "grammar"):
        return {"lark_grammar": to_lark(value)}
    if key == "regex":
        return {"lark_grammar": f"start: /{_for_lark(value)}/"}
    if not all(isinstance(choice, str) and choice for choice in value):
        raise BadRequest('invalid format: "choices" must be strings that are not empty')
    choices = " | ".join(msgspec.json.encode(choice).decode() for choice in value)
    return {"lark_grammar": f"start: {choices}"}


def _for_lark(regex: str) -> str:
    """Between slashes: those that are not escaped yet, and line breaks, are."""
    made, escaped = [], False
    for character in regex:
        made.append(r"\/" if character == "/" and not escaped else r"\n" if character == "\n" else character)
        escaped = character == "\\" and not escaped
    return "".join(made)
