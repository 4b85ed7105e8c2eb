"""GBNF, llama.cpp's notation of grammars, to rules whose literals and sets of characters are regular expressions.

Knows no tokens and no models. The notation is that of llama.cpp's grammars/README.md; its tokens in angle brackets are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ollamapy.errors import BadRequest

MAX_REPEATS = 2000  # as in llama.cpp
MAX_DEPTH = 64  # of parentheses
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX = {"x": 2, "u": 4, "U": 8}
_SIGNS = frozenset("\\/.+*?()|[]{}^$-&~#")  # of regular expressions
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Text(NamedTuple):
    """A literal or a set of characters, as a regular expression."""

    regex: str


class Ref(NamedTuple):
    name: str
    line: int


class Choice(NamedTuple):
    """One of several sequences."""

    sequences: list[list[Node]]


class Repeat(NamedTuple):
    node: Node
    least: int
    most: int | None


Node = Text | Ref | Choice | Repeat


@dataclass(slots=True)
class Source:
    """The grammar's text and how far it has been read."""

    text: str
    at: int = 0

    def peek(self, size: int = 1) -> str:
        return self.text[self.at : self.at + size]

    def take(self, expected: str) -> bool:
        if not self.text.startswith(expected, self.at):
            return False
        self.at += len(expected)
        return True

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def error(self, problem: str) -> BadRequest:
        near = self.peek(20).split("\n")[0]
        return BadRequest(f"invalid grammar: line {self.line}: {problem}" + (f", at {near!r}" if near else ""))

    def skip(self, lines: bool) -> None:
        """Spaces and comments, with `lines` also ends of lines."""
        while self.at < len(self.text):
            if self.peek() == "#":
                end = self.text.find("\n", self.at)
                self.at = end if end >= 0 else len(self.text)
            elif self.peek() in (" ", "\t") or (lines and self.peek() in ("\r", "\n")):
                self.at += 1
            else:
                return

    def name(self) -> str:
        start = self.at
        while (c := self.peek()) and c.isascii() and (c.isalnum() or c in "-_"):
            self.at += 1
        return self.text[start : self.at]

    def number(self) -> int:
        start = self.at
        while self.peek().isdecimal() and self.peek().isascii():
            self.at += 1
        if self.at == start:
            raise self.error("a number is expected")
        found = int(self.text[start : self.at][:9])
        if found > MAX_REPEATS:
            raise self.error(f"more than {MAX_REPEATS} repetitions")
        return found

    def character(self) -> str:
        """One, maybe escaped."""
        c = self.peek()
        if not c:
            raise self.error("the text ends inside quotes or brackets")
        self.at += 1
        if c != "\\":
            return c
        kind = self.peek()
        self.at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        size = _HEX.get(kind, 0)
        digits = self.peek(size)
        try:
            made = chr(int(digits, 16)) if size and len(digits) == size and digits.isalnum() else ""
        except (ValueError, OverflowError):
            made = ""
        if not made or "\ud800" <= made <= "\udfff":
            self.at -= 2
            raise self.error("an unknown escape")
        self.at += size
        return made


def parse(text: str) -> dict[str, Choice]:
    """Rules by name; there is a root. Raises BadRequest with the line that is wrong."""
    source = Source(text)
    rules: dict[str, Choice] = {}
    used: list[Ref] = []
    source.skip(lines=True)
    while source.at < len(source.text):
        name = source.name()
        if not name:
            raise source.error("the name of a rule is expected")
        if name in rules:
            raise source.error(f"there is a rule '{name}' already")
        source.skip(lines=False)
        if not source.take("::="):
            raise source.error(f"'::=' is expected after the name '{name}'")
        source.skip(lines=True)
        rules[name] = _choice(source, used, 0)
        if source.peek() not in ("", "\r", "\n"):
            raise source.error("the end of the line is expected")
        source.skip(lines=True)
    for ref in used:
        if ref.name not in rules:
            raise BadRequest(f"invalid grammar: line {ref.line}: there is no rule '{ref.name}'")
    if "root" not in rules:
        raise BadRequest("invalid grammar: there is no rule 'root'")
    return rules


def _choice(source: Source, used: list[Ref], depth: int) -> Choice:
    if depth > MAX_DEPTH:
        raise source.error(f"more than {MAX_DEPTH} parentheses inside each other")
    sequences = [_sequence(source, used, depth)]
    while source.take("|"):
        source.skip(lines=True)
        sequences.append(_sequence(source, used, depth))
    return Choice(sequences)


def _sequence(source: Source, used: list[Ref], depth: int) -> list[Node]:
    found: list[Node] = []
    while (node := _item(source, used, depth)) is not None:
        source.skip(lines=depth > 0)
        while (bounds := _bounds(source)) is not None:
            node = Repeat(node, *bounds)
            source.skip(lines=depth > 0)
        found.append(node)
    return found


def _item(source: Source, used: list[Ref], depth: int) -> Node | None:
    """None where the sequence ends."""
    if source.take('"'):
        made = []
        while not source.take('"'):
            made.append(escaped(source.character()))
        return Text("".join(made))
    if source.take("["):
        return _set(source)
    if source.take("."):
        return Text(r"[\u{0}-\u{10FFFF}]")
    if source.take("("):
        source.skip(lines=True)
        inner = _choice(source, used, depth + 1)
        if not source.take(")"):
            raise source.error("')' is expected")
        return inner
    if source.peek() in ("<", "!"):
        raise source.error("tokens in angle brackets are not supported")
    line = source.line
    name = source.name()
    if not name:
        return None
    used.append(Ref(name, line))
    return used[-1]


def _set(source: Source) -> Text:
    negated = source.take("^")
    parts = []
    while not source.take("]"):
        first = last = source.character()
        if source.peek() == "-" and source.peek(2) != "-]":
            source.at += 1
            last = source.character()
            if last < first:
                raise source.error("a range of characters that is empty")
        parts.append(escaped(first) if first == last else f"{escaped(first)}-{escaped(last)}")
    if not parts and not negated:
        raise source.error("a set of no characters")
    return Text(f"[{'^' if negated else ''}{''.join(parts)}]" if parts else r"[\u{0}-\u{10FFFF}]")


def _bounds(source: Source) -> tuple[int, int | None] | None:
    if found := _REPEATS.get(source.peek()):
        source.at += 1
        return found
    if not source.take("{"):
        return None
    source.skip(lines=True)
    least = source.number()
    most: int | None = least
    source.skip(lines=True)
    if source.take(","):
        source.skip(lines=True)
        most = None if source.peek() == "}" else source.number()
        source.skip(lines=True)
    if not source.take("}"):
        raise source.error("'}' is expected")
    if most is not None and most < least:
        raise source.error(f"from {least} to {most} repetitions")
    return least, most


def escaped(character: str) -> str:
    """For a regular expression, inside brackets too."""
    if character in _SIGNS:
        return "\\" + character
    return character if character.isprintable() else f"\\u{{{ord(character):X}}}"
