"""GBNF's rules to llguidance's dialect of Lark. Knows no notation.

What is regular (without recursion) becomes one regular expression, which is exact; of a recursive grammar, each run of
regular parts between two references does. llguidance reads those greedily: where such a run could end or go on, it goes on.
"""

from __future__ import annotations

from ollamapy.errors import BadRequest
from ollamapy.server.gbnf import Choice, Node, Ref, Repeat, Text, parse

MAX_CHAIN = 200  # rules that refer to each other before their text is no longer put in place of their names
MAX_REGEX = 8192  # characters of one regular expression


def to_lark(text: str) -> str:
    """Of a grammar in GBNF. Raises BadRequest with the line that is wrong."""
    try:
        return Writer(parse(text)).write()
    except RecursionError:
        raise BadRequest("invalid grammar: nested too deeply") from None


class Writer:
    """Rules to Lark."""

    def __init__(self, rules: dict[str, Choice]) -> None:
        self._rules = rules
        self._names = {name: "start" if name == "root" else f"r{place}" for place, name in enumerate(rules)}
        self._regular: dict[str, str | None] = {}
        self._open: set[str] = set()

    def write(self) -> str:
        written, lines, waiting = {"root"}, [], ["root"]
        while waiting:
            name = waiting.pop()
            refs: list[str] = []
            lines.append(f"{self._names[name]}: {self._lark(self._rules[name], refs)}")
            for ref in refs:
                if ref not in written:
                    written.add(ref)
                    waiting.append(ref)
        return "\n".join(lines)

    def _regex(self, node: Node) -> str | None:
        """None where the node is not regular, or too long as a regular expression."""
        found: str | None
        if isinstance(node, Text):
            return node.regex
        if isinstance(node, Ref):
            return self._rule_regex(node.name)
        if isinstance(node, Repeat):
            inner = self._regex(node.node)
            found = None if inner is None else f"(?:{inner}){_times(node)}"
        else:
            parts = [[self._regex(item) for item in sequence] for sequence in node.sequences]
            if any(item is None for sequence in parts for item in sequence):
                return None
            found = "(?:" + "|".join("".join(item or "" for item in sequence) for sequence in parts) + ")"
        return found if found is not None and len(found) <= MAX_REGEX else None

    def _rule_regex(self, name: str) -> str | None:
        if name in self._open or len(self._open) >= MAX_CHAIN:
            return None
        if name not in self._regular:
            self._open.add(name)
            self._regular[name] = self._regex(self._rules[name])
            self._open.remove(name)
        return self._regular[name]

    def _lark(self, node: Node, refs: list[str]) -> str:
        regex = self._regex(node)
        if regex is not None:
            return _terminal(regex)
        if isinstance(node, Ref):
            refs.append(node.name)
            return self._names[node.name]
        if isinstance(node, Repeat):
            return f"({self._lark(node.node, refs)}){_times(node)}"
        assert isinstance(node, Choice)
        return "(" + " | ".join(self._sequence(sequence, refs) for sequence in node.sequences) + ")"

    def _sequence(self, nodes: list[Node], refs: list[str]) -> str:
        parts, run = [], ""
        for node in nodes:
            regex = self._regex(node)
            if regex is not None and len(run) + len(regex) <= MAX_REGEX:
                run += regex
                continue
            if run:
                parts.append(_terminal(run))
            run = regex or ""
            if regex is None:
                parts.append(self._lark(node, refs))
        if run:
            parts.append(_terminal(run))
        return " ".join(parts) or '""'


def _times(repeat: Repeat) -> str:
    least, most = repeat.least, repeat.most
    return f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"


def _terminal(regex: str) -> str:
    return f"/{regex}/" if regex else '""'
