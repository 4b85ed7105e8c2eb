"""An interpreter of Go's text/template as Ollama uses it (missing map keys are nil). Knows no chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollamapy.chat.budget import Budget
from ollamapy.chat.gotemplate.execute import Execution
from ollamapy.chat.gotemplate.functions import BUILTINS
from ollamapy.chat.gotemplate.nodes import Chain, Field, Node, Variable, walk
from ollamapy.chat.gotemplate.parser import Parser
from ollamapy.errors import TemplateError

MAX_SOURCE = 256 << 10  # characters


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template; made by `parse`, executed any number of times, by several threads at once."""

    source: str
    root: Sequence[Node]
    templates: Mapping[str, Sequence[Node]]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Raises TemplateError with the line at fault."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"template is longer than {MAX_SOURCE} characters")
        templates = Parser(source, BUILTINS).parse()
        return cls(source, templates[""], templates)

    def with_root(self, root: Sequence[Node]) -> Template:
        """The same templates with another main body."""
        return Template(self.source, root, {**self.templates, "": root})

    def execute(self, data: Any) -> str:
        """The text for `data`: a mapping, with `values.Struct` for values of fixed fields. Raises TemplateError."""
        try:
            return Execution(self.templates, data, Budget()).run(self.root, data)
        except RecursionError:
            raise TemplateError("template is nested too deep") from None

    def variables(self) -> frozenset[str]:
        """Names of all fields used anywhere, each with its dot: `.Messages`, `.Role`."""
        names: set[str] = set()
        for body in self.templates.values():
            for node in walk(list(body)):
                if isinstance(node, (Field, Variable, Chain)):
                    names.update(f".{name}" for name in node.names)
        return frozenset(names)
