"""Chat templates in Jinja, as Hugging Face models carry them, in a sandbox with limits of steps, time, text and depth.

The code is the model publisher's: it may read what it is given and make text. Beyond Jinja's immutable sandbox, each
template is rewritten before it is compiled (`_Instrument`) so that loops, texts that it captures, joins, slices and
comparisons are charged to the budget of the rendering.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ollamapy.chat.budget import Budget
from ollamapy.chat.jinjafilters import budget_of, limited_filters, limited_tests, made
from ollamapy.chat.jinjalimits import OPERATORS, method_result, weight
from ollamapy.errors import TemplateError

MAX_SOURCE = 256 << 10  # characters; the longest templates in use have under 40,000

# Filters of the rewritten templates. No template can name them itself: a name has no space.
_LOOPED, _EMITTED, _JOINED, _MADE, _COMPARED = " looped", " emitted", " joined", " made", " compared"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; its body renders as if the mark was not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Instrument(NodeTransformer):
    """Puts the charging filters where a template's own code would run or grow unseen."""

    def __init__(self) -> None:
        self._captured = 0  # depth of macros and blocks whose text does not go straight to the output

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._captured += node.recursive
        self.generic_visit(node)
        self._captured -= node.recursive
        node.iter = _through(node.iter, _LOOPED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._output(child) for child in node.nodes]
        return node

    def _output(self, child: nodes.Expr) -> nodes.Expr:
        if not isinstance(child, nodes.TemplateData):
            return _through(child, _EMITTED)
        return _through(nodes.Const(child.data, lineno=child.lineno), _EMITTED) if self._captured else child

    def _capturing(self, node: nodes.Node) -> nodes.Node:
        self._captured += 1
        self.generic_visit(node)
        self._captured -= 1
        return node

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_AssignBlock = visit_Block = _capturing

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return nodes.Filter(first, _JOINED, rest, [], None, None, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def _container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        fixed = all(isinstance(part, nodes.Const) for part in node.iter_child_nodes())
        return node if stored or fixed else _through(node, _MADE)

    visit_List = visit_Tuple = visit_Dict = _container

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *[operand.expr for operand in node.ops]]
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        if not searches and any(isinstance(side, nodes.Const) for side in sides):
            return node  # a short constant ends the comparison soon
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _through(operand.expr, _COMPARED)
        return node


def _through(expression: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(expression, nodes.Expr)
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


@pass_context
def _looped(context: Context, iterable: Any) -> Any:
    budget = budget_of(context)
    if hasattr(iterable, "__len__"):
        budget.step(1 + len(iterable))
        return iterable
    return _counted(iterable, budget)


def _counted(iterable: Any, budget: Budget) -> Iterator[Any]:
    for item in iterable:
        budget.step()
        yield item


@pass_context
def _emitted(context: Context, value: Any) -> Any:
    budget_of(context).make(weight(value))
    return value


@pass_context
def _joined(context: Context, *values: Any) -> str:
    budget_of(context).make(sum([weight(value) for value in values]))
    return "".join([str(value) for value in values])


@pass_context
def _made(context: Context, value: Any) -> Any:
    return made(budget_of(context), value)


class _Context(Context):
    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        context.budget = self.budget  # type: ignore[attr-defined]
        return context


class _Namespace(Namespace):
    """A `namespace()` that takes no attribute with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute may not start with an underscore: {name!r}")


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 256 or re.search(r"%[-_0^#+]*[0-9]", format):
        raise TemplateError("strftime_now: the format is too long or has a width")
    return datetime.datetime.now().strftime(format)


class _Environment(ImmutableSandboxedEnvironment):
    context_class = _Context
    intercepted_binops = frozenset(OPERATORS)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        ours: dict[str, Any] = {_LOOPED: _looped, _EMITTED: _emitted, _JOINED: _joined, _MADE: _made, _COMPARED: _emitted}
        self.filters = {**limited_filters(), **ours}
        self.tests = limited_tests()
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(__context)
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            budget.make(method_result("" if isinstance(owner, int) else owner, method.__name__, args, kwargs))
        elif isinstance(__obj, LoopContext) and args:
            budget.make(weight(args[0]))
        budget.enter()
        try:
            return made(budget, super().call(__context, __obj, *args, **kwargs))
        finally:
            budget.leave()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget_of(context).make(OPERATORS[operator](left, right))
        return made(budget_of(context), super().call_binop(context, operator, left, right))


_ENVIRONMENT = _Environment()


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template; the last 64 are remembered. Raises TemplateError."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"chat template is longer than {MAX_SOURCE} characters")
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TemplateError(f"chat template does not compile: {error}") from None


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a chat template. Raises TemplateError: with the template's own text when it raises one itself."""
    template = compile_template(source)
    budget = Budget()
    context = template.new_context(dict(variables))
    context.budget = budget  # type: ignore[attr-defined]
    pieces: list[str] = []
    try:
        for piece in template.root_render_func(context):
            budget.emit(len(piece))
            budget.step()
            pieces.append(piece)
    except TemplateError:
        raise
    except jinja2.TemplateError as error:
        raise TemplateError(error.message or type(error).__name__) from None
    except Exception as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from None
    return "".join(pieces)
