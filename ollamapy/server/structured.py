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

import asyncio
import contextlib
import hashlib
import logging
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ollamapy.chat.thinking import ThinkingParser
from ollamapy.env import child_environment
from ollamapy.errors import BadRequest
from ollamapy.server.gbnf_lark import to_lark

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 10  # of a format, as JSON
MAX_DEPTH = 32
SECONDS = 2.0  # to check one
MAX_REMEMBERED = 256
_ROOT = str(Path(__file__).parents[2])
_START = f"import sys; sys.path.append({_ROOT!r}); from ollamapy.server.grammar_check import main; main()"
COMMAND = (sys.executable, "-P", "-c", _START)
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
    """Checks formats, one at a time, and remembers what came of it. The child starts with the first one."""

    def __init__(self) -> None:
        self._remembered: OrderedDict[bytes, Answer | str] = OrderedDict()
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    async def check(self, format: Any) -> Answer | None:
        """None for no format. Raises BadRequest with llguidance's reason when an answer cannot be held to it."""
        if format in (None, ""):
            return None
        text = _bounded(format)
        key = hashlib.sha256(text).digest()
        found = self._remembered.pop(key, None)
        if found is None:
            entry = _entry(format)
            error = await self._ask(entry)
            found = error or Answer(entry)
        self._remembered[key] = found
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        if isinstance(found, str):
            raise BadRequest(f"invalid format: {found}")
        return found

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _ask(self, entry: dict[str, Any]) -> str:
        """What is wrong with a grammar; "" when nothing is. Raises BadRequest when that takes too long or ends the child."""
        question = msgspec.json.encode({"grammars": [{"lark_grammar": _TOP + "start: @answer"}, {"name": "answer", **entry}]})
        async with self._lock:
            try:
                child = self._child
                if child is None or child.returncode is not None:
                    child = await self._start()
                assert child.stdin is not None and child.stdout is not None
                async with asyncio.timeout(SECONDS):
                    child.stdin.write(question + b"\n")
                    await child.stdin.drain()
                    line = await child.stdout.readline()
                return str(msgspec.json.decode(line))
            except TimeoutError:
                await self.close()
                raise BadRequest(f"invalid format: it takes more than {SECONDS:g} s to compile") from None
            except (OSError, RuntimeError, msgspec.DecodeError):  # the child has ended: its memory, or a fault in llguidance
                await self.close()
                raise BadRequest("invalid format: it cannot be compiled") from None
            except asyncio.CancelledError:  # the child would answer the next question with this one's answer
                await self.close()
                raise

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        environment = child_environment(OPENBLAS_NUM_THREADS="1", RAYON_NUM_THREADS="1")
        child = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=pipe,
            stdout=pipe,
            env=environment,
            start_new_session=True,  # Ctrl-C is the daemon's; the child ends with its stdin
        )
        self._child = child  # before anything is awaited: a client that leaves now must not leave a process behind
        assert child.stdout is not None
        await child.stdout.readline()  # it has imported what it needs: the time that counts begins now
        return child


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
