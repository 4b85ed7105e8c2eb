"""Splits a Go template into text and the tokens of its actions. Knows delimiters, trims and comments; no grammar.

Rules of Go's text/template: https://pkg.go.dev/text/template#hdr-Text_and_spaces
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

from ollamapy.errors import TemplateError

SPACES = " \t\r\n"
KEYWORDS = frozenset({"block", "break", "continue", "define", "else", "end", "if", "range", "template", "with"})
_ACTION = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<string>"(?:[^"\\\n]|\\[^\n])*")
      | (?P<raw>`[^`]*`)
      | (?P<char>'(?:[^'\\\n]|\\[^\n])+')
      | (?P<number>[+-]?(?:0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+
                     |(?:\d(?:_?\d)*(?:\.(?:\d(?:_?\d)*)?)?|\.\d(?:_?\d)*)(?:[eE][+-]?\d(?:_?\d)*)?))
      | (?P<field>\.[^\W\d]\w*)
      | (?P<variable>\$\w*)
      | (?P<word>[^\W\d]\w*)
      | (?P<mark>:=|[=,|().])""",
    re.VERBOSE,
)
_NEED_TERMINATOR = frozenset({"field", "variable", "word"})


class Token(NamedTuple):
    """`kind` is text, space, string, raw, char, number, field, variable, word, keyword, right, eof, or a mark itself."""

    kind: str
    text: str
    line: int


def failure(line: int, problem: str) -> TemplateError:
    return TemplateError(f"template: :{line}: {problem}")


def tokens(source: str) -> Iterator[Token]:
    """Tokens of `source`, in order, ended by one `eof`. Raises TemplateError at the first character that fits nothing."""
    position, line = 0, 1
    while True:
        start = source.find("{{", position)
        if start < 0:
            yield Token("text", source[position:], line)
            yield Token("eof", "", line + source.count("\n", position))
            return
        text = source[position:start]
        inside = start + 2
        if source[inside : inside + 1] == "-" and source[inside + 1 : inside + 2] in tuple(SPACES):
            text = text.rstrip(SPACES)
            inside += 2
        yield Token("text", text, line)
        line += source.count("\n", position, inside)
        if source.startswith("/*", inside):
            end = _after_comment(source, inside, line)
        else:
            end = yield from _action(source, inside, line)
        trimmed = source[end - 3] == "-" and source[end - 4] in SPACES and end - 4 >= inside - 1
        position = end
        if trimmed:
            while position < len(source) and source[position] in SPACES:
                position += 1
        line += source.count("\n", inside, position)


def _after_comment(source: str, inside: int, line: int) -> int:
    """Offset just after the closing delimiter of the comment that starts at `inside`."""
    close = source.find("*/", inside)
    if close < 0:
        raise failure(line, "unclosed comment")
    after = close + 2
    if source[after : after + 1] in tuple(SPACES) and source.startswith("-}}", after + 1):
        after += 2
    if not source.startswith("}}", after):
        raise failure(line, "comment ends before closing delimiter")
    return after + 2


def _action(source: str, inside: int, line: int) -> Generator[Token, None, int]:
    """Tokens of one action; its return value is the offset just after the closing delimiter."""
    position = inside
    while not source.startswith("}}", position):
        match = _ACTION.match(source, position)
        if match is None:
            raise failure(line, _complaint(source, position))
        kind, text, end = str(match.lastgroup), match.group(), match.end()
        if kind == "space" and source.startswith("-}}", end):
            if len(text) > 1:
                yield Token("space", text, line)
            yield Token("right", "-}}", line + text.count("\n"))
            return end + 3
        if kind in _NEED_TERMINATOR and not _terminated(source, end):
            raise failure(line, f"bad character U+{ord(source[end]):04X} {source[end]!r}")
        if kind == "number" and source[end : end + 1].isalnum():
            raise failure(line, f"bad number syntax: {source[position : end + 1]!r}")
        if kind == "word":
            kind = "keyword" if text in KEYWORDS else "word"
        yield Token(text if kind == "mark" else kind, text, line)
        line += text.count("\n")
        position = end
    yield Token("right", "}}", line)
    return position + 2


def _terminated(source: str, position: int) -> bool:
    return position >= len(source) or source[position] in " \t\r\n.,|:()" or source.startswith("}}", position)


def _complaint(source: str, position: int) -> str:
    character = source[position : position + 1]
    if character == '"':
        return "unterminated quoted string"
    if character == "`":
        return "unterminated raw quoted string"
    if character == "'":
        return "unterminated character constant"
    if not character:
        return "unclosed action"
    if character in "+-":
        return f"bad number syntax: {source[position : position + 2]!r}"
    return f"unexpected {character!r} in action"
