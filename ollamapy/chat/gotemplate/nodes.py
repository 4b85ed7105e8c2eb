"""The parse tree of a Go template: plain data that the parser makes and the executor walks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class Node:
    line: int


@dataclass(slots=True)
class Constant(Node):
    """A literal, `true`, `false` or `nil`; `text` is how it was written."""

    value: str | bool | int | float | None
    text: str


@dataclass(slots=True)
class Dot(Node):
    pass


@dataclass(slots=True)
class Field(Node):
    """`.A.B`"""

    names: tuple[str, ...]


@dataclass(slots=True)
class Variable(Node):
    """`$x.A.B`; `name` keeps its dollar."""

    name: str
    names: tuple[str, ...]


@dataclass(slots=True)
class Function(Node):
    name: str


@dataclass(slots=True)
class Chain(Node):
    """`(pipeline).A.B`"""

    base: Node
    names: tuple[str, ...]


@dataclass(slots=True)
class Command(Node):
    """An operand with its arguments."""

    args: list[Node]


@dataclass(slots=True)
class Pipe(Node):
    """`$a, $b := command | command`; without `declares` the variables are assigned to."""

    variables: tuple[str, ...]
    declares: bool
    commands: list[Command]


@dataclass(slots=True)
class Text(Node):
    text: str


@dataclass(slots=True)
class Action(Node):
    pipe: Pipe


@dataclass(slots=True)
class Branch(Node):
    """One arm of if or with."""

    pipe: Pipe
    body: list[Node]


@dataclass(slots=True)
class If(Node):
    """if / else if / else."""

    branches: list[Branch]
    otherwise: list[Node]


@dataclass(slots=True)
class With(Node):
    """with / else with / else."""

    branches: list[Branch]
    otherwise: list[Node]


@dataclass(slots=True)
class Range(Node):
    pipe: Pipe
    body: list[Node]
    otherwise: list[Node]


@dataclass(slots=True)
class Call(Node):
    """`{{ template "name" pipeline }}`"""

    name: str
    pipe: Pipe | None


@dataclass(slots=True)
class Break(Node):
    pass


@dataclass(slots=True)
class Continue(Node):
    pass


def children(node: Node) -> Iterator[Node]:
    """Direct children, in source order."""
    for field in fields(node):
        value: Any = getattr(node, field.name)
        if isinstance(value, Node):
            yield value
        elif isinstance(value, list):
            yield from value


def walk(nodes: list[Node]) -> Iterator[Node]:
    """All nodes below, parents first."""
    for node in nodes:
        yield node
        yield from walk(list(children(node)))


def is_empty(body: list[Node]) -> bool:
    """Whether the body writes nothing but spaces."""
    return all(isinstance(node, Text) and not node.text.strip() for node in body)
