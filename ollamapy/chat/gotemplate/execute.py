"""Runs a parsed Go template over data: evaluation of pipelines, control flow, variables, and the limits of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ollamapy.chat.budget import Budget
from ollamapy.chat.gotemplate.functions import BUILTINS, weight
from ollamapy.chat.gotemplate.lexer import failure
from ollamapy.chat.gotemplate.nodes import (
    Action,
    Break,
    Call,
    Chain,
    Command,
    Constant,
    Continue,
    Dot,
    Field,
    Function,
    If,
    Node,
    Pipe,
    Range,
    Text,
    Variable,
    With,
)
from ollamapy.chat.gotemplate.printing import plain
from ollamapy.chat.gotemplate.values import Struct, clean, truth, type_name

_MISSING: Any = object()  # no value comes from an earlier stage of the pipeline
_GO_ON, _BREAK, _CONTINUE = range(3)


class Execution:
    """One run. `write` collects the output; variables are a stack searched from its end, as in Go."""

    def __init__(self, templates: Mapping[str, Sequence[Node]], data: Any, budget: Budget) -> None:
        self._templates = templates
        self._budget = budget
        self._variables: list[list[Any]] = [["$", data]]  # name, value
        self._pieces: list[str] = []

    def run(self, body: Sequence[Node], dot: Any) -> str:
        self._walk(body, dot)
        return clean("".join(self._pieces))

    def _emit(self, text: str) -> None:
        self._budget.emit(len(text))
        self._pieces.append(text)

    # --- statements ---

    def _walk(self, body: Sequence[Node], dot: Any) -> int:
        for node in body:
            self._budget.step()
            handler = _STATEMENTS.get(type(node))
            if handler is None:
                return _BREAK if isinstance(node, Break) else _CONTINUE
            flow = handler(self, node, dot)
            if flow:
                return flow
        return _GO_ON

    def _text(self, node: Text, dot: Any) -> int:
        self._emit(node.text)
        return _GO_ON

    def _action(self, node: Action, dot: Any) -> int:
        value = self._pipe(node.pipe, dot)
        if not node.pipe.variables:
            if isinstance(value, str):
                self._emit(value)
            else:
                self._budget.make(weight(value))
                self._emit("<no value>" if value is None else plain(value))
        return _GO_ON

    def _if(self, node: If | With, dot: Any) -> int:
        scope = len(self._variables)
        flow = _GO_ON
        for branch in node.branches:
            value = self._pipe(branch.pipe, dot)
            if truth(value):
                flow = self._walk(branch.body, value if isinstance(node, With) else dot)
                break
        else:
            flow = self._walk(node.otherwise, dot)
        del self._variables[scope:]
        return flow

    def _range(self, node: Range, dot: Any) -> int:
        scope = len(self._variables)
        value = self._pipe(node.pipe, dot)
        pairs = self._iterate(value, node)
        flow, empty = _GO_ON, True
        start = len(self._variables)
        for key, item in pairs:
            empty = False
            self._budget.step()
            self._bind(node.pipe, key, item)
            flow = self._walk(node.body, item)
            del self._variables[start:]
            if flow == _BREAK:
                break
        flow = self._walk(node.otherwise, dot) if empty else _GO_ON
        del self._variables[scope:]
        return flow

    def _iterate(self, value: Any, node: Range) -> Any:
        """(key, element) pairs of a list, map (sorted keys) or count."""
        if isinstance(value, list):
            return enumerate(value)
        if isinstance(value, dict):
            return [(key, value[key]) for key in sorted(value)]
        if isinstance(value, int) and not isinstance(value, bool):
            if len(node.pipe.variables) > 1:
                raise failure(node.line, f"can't use {value} to iterate over more than one variable")
            return ((number, number) for number in range(value))
        if value is None:
            return ()
        raise failure(node.line, f"range can't iterate over {plain(value)[:80]}")

    def _bind(self, pipe: Pipe, key: Any, item: Any) -> None:
        """Sets range's variables for one round: element, or key and element."""
        values = (item,) if len(pipe.variables) == 1 else (key, item)
        for name, value in zip(pipe.variables, values, strict=False):
            if pipe.declares:
                self._set(name, value)
            else:
                self._assign(name, value, pipe)

    def _call(self, node: Call, dot: Any) -> int:
        body = self._templates.get(node.name)
        if body is None:
            raise failure(node.line, f'template "{node.name}" not defined')
        value = None if node.pipe is None else self._pipe(node.pipe, dot)
        outer, self._variables = self._variables, [["$", value]]
        self._budget.enter()
        self._walk(body, value)
        self._budget.leave()
        self._variables = outer
        return _GO_ON

    # --- variables ---

    def _set(self, name: str, value: Any) -> None:
        self._variables.append([name, value])

    def _slot(self, name: str, node: Node) -> list[Any]:
        slot: list[Any]
        for slot in reversed(self._variables):
            if slot[0] == name:
                return slot
        raise failure(node.line, f"undefined variable: {name}")

    def _assign(self, name: str, value: Any, node: Node) -> None:
        self._slot(name, node)[1] = value

    # --- values ---

    def _pipe(self, pipe: Pipe, dot: Any) -> Any:
        value = _MISSING
        for command in pipe.commands:
            value = self._command(command, dot, value)
        for name in pipe.variables:
            if pipe.declares:
                self._set(name, value)
            else:
                self._assign(name, value, pipe)
        return value

    def _command(self, command: Command, dot: Any, final: Any) -> Any:
        first, args = command.args[0], command.args[1:]
        if isinstance(first, Function):
            return self._function(first, args, dot, final)
        self._budget.step()
        if args or final is not _MISSING:
            self._refuse_arguments(first)
        if isinstance(first, Constant) and first.value is None:
            raise failure(first.line, "nil is not a command")
        return self._value(first, dot)

    def _refuse_arguments(self, node: Node) -> None:
        if isinstance(node, (Field, Variable, Chain)) and node.names:
            raise failure(node.line, f"{node.names[-1]} is not a method but has arguments")
        raise failure(node.line, "can't give argument to non-function")

    def _value(self, node: Node, dot: Any) -> Any:
        return _OPERANDS[type(node)](self, node, dot)

    def _fields(self, receiver: Any, names: Sequence[str], node: Node) -> Any:
        """`receiver.a.b`: map keys (nil when missing) and struct fields. Fields of nil itself are nil."""
        if receiver is None:
            return None
        for name in names:
            if isinstance(receiver, dict):
                receiver = receiver.get(name)
            elif isinstance(receiver, Struct) and name in receiver.values:
                receiver = receiver.values[name]
            elif receiver is None:
                raise failure(node.line, f"nil pointer evaluating interface {{}}.{name}")
            else:
                raise failure(node.line, f"can't evaluate field {name} in type {type_name(receiver)}")
        return receiver

    def _function(self, node: Function, args: Sequence[Node], dot: Any, final: Any) -> Any:
        self._budget.step()
        builtin = BUILTINS[node.name]
        count = len(args) + (final is not _MISSING)
        if count < builtin.least or (builtin.most is not None and count > builtin.most):
            least = f"at least {builtin.least}" if builtin.most != builtin.least else str(builtin.least)
            raise failure(node.line, f"wrong number of args for {node.name}: want {least} got {count}")
        if node.name in ("and", "or"):
            return self._logic(node.name, args, dot, final)
        values = [self._value(arg, dot) for arg in args]
        if final is not _MISSING:
            values.append(final)
        try:
            result = builtin.call(values, self._budget)
        except ValueError as error:
            raise failure(node.line, f"error calling {node.name}: {error}") from None
        if isinstance(result, str):
            self._budget.make(len(result))
        return result

    def _logic(self, name: str, args: Sequence[Node], dot: Any, final: Any) -> Any:
        """`and` and `or` give the argument that decides, and evaluate none after it."""
        value: Any = None
        for arg in args:
            value = self._value(arg, dot)
            if truth(value) == (name == "or"):
                return value
        return value if final is _MISSING else final


def _constant(run: Execution, node: Constant, dot: Any) -> Any:
    return node.value


def _dot(run: Execution, node: Dot, dot: Any) -> Any:
    return dot


def _field(run: Execution, node: Field, dot: Any) -> Any:
    return run._fields(dot, node.names, node)


def _variable(run: Execution, node: Variable, dot: Any) -> Any:
    return run._fields(run._slot(node.name, node)[1], node.names, node)


def _chain(run: Execution, node: Chain, dot: Any) -> Any:
    return run._fields(run._value(node.base, dot), node.names, node)


_OPERANDS: dict[type[Node], Callable[[Execution, Any, Any], Any]] = {
    Constant: _constant,
    Dot: _dot,
    Field: _field,
    Variable: _variable,
    Chain: _chain,
    Pipe: Execution._pipe,
    Function: lambda run, node, dot: run._function(node, (), dot, _MISSING),
}
_STATEMENTS: dict[type[Node], Callable[[Execution, Any, Any], int]] = {
    Text: Execution._text,
    Action: Execution._action,
    If: Execution._if,
    With: Execution._if,
    Range: Execution._range,
    Call: Execution._call,
}
assert {Break, Continue}.isdisjoint(_STATEMENTS)
