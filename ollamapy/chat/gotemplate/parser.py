"""Go template source to parse trees: grammar, scopes of variables, known functions. Executes nothing."""

from __future__ import annotations

from collections.abc import Collection

from ollamapy.chat.gotemplate import nodes
from ollamapy.chat.gotemplate.lexer import Token, failure, tokens
from ollamapy.chat.gotemplate.literals import number, unquote, unquote_char
from ollamapy.chat.gotemplate.nodes import Node
from ollamapy.errors import TemplateError

MAX_DEPTH = 64  # nested blocks and parentheses; Python's own stack is the reason for a limit
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "nil": None}
_OPERAND_START = frozenset({"field", "variable", "word", "number", "string", "raw", "char", ".", "("})


class Parser:
    """One parse. After `parse()`, `templates` has the named templates (define, block) and "" the text itself."""

    def __init__(self, source: str, functions: Collection[str]) -> None:
        self._tokens = list(tokens(source))
        self._next = 0
        self._functions = functions
        self._variables = ["$"]
        self._depth = 0
        self._loops = 0
        self.templates: dict[str, list[Node]] = {}

    def parse(self) -> dict[str, list[Node]]:
        body, end = self._list()
        if end.kind != "eof":
            raise failure(end.line, f"unexpected {{{{{end.text}}}}}")
        self.templates[""] = body
        return self.templates

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind != "eof":
            self._next += 1
        return token

    def _skip_space(self) -> Token:
        """The next token that is not space, not taken."""
        while self._tokens[self._next].kind == "space":
            self._next += 1
        return self._tokens[self._next]

    def _take_solid(self) -> Token:
        self._skip_space()
        return self._take()

    def _expect(self, kind: str, where: str) -> Token:
        token = self._take_solid()
        if token.kind != kind:
            raise self._unexpected(token, where)
        return token

    def _unexpected(self, token: Token, where: str) -> TemplateError:
        shown = "EOF" if token.kind == "eof" else "{{end}}" if token.text == "end" else f'"{token.text}"'
        return failure(token.line, f"unexpected {shown} in {where}")

    def _deeper(self, line: int) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise failure(line, f"template is nested more than {MAX_DEPTH} deep")

    def _list(self) -> tuple[list[Node], Token]:
        """Nodes up to the `end` or `else` (taken and returned) or the end of the source."""
        body: list[Node] = []
        while True:
            token = self._take()
            if token.kind == "text":
                if token.text:
                    body.append(nodes.Text(token.line, token.text))
                continue
            if token.kind == "eof":
                return body, token
            self._next -= 1
            first = self._skip_space()
            if first.kind == "keyword":
                self._next += 1
                if first.text in ("end", "else"):
                    return body, first
                node = self._statement(first)
                if node is not None:
                    body.append(node)
            else:
                body.append(nodes.Action(first.line, self._pipeline("command", "right")))

    def _statement(self, token: Token) -> Node | None:
        if token.text in ("if", "with"):
            return self._branches(token)
        if token.text == "range":
            return self._range(token)
        if token.text == "template":
            return self._call(token)
        if token.text in ("define", "block"):
            return self._define(token)
        if self._loops == 0:
            raise failure(token.line, f"{{{{{token.text}}}}} outside {{{{range}}}}")
        self._expect("right", f"{{{{{token.text}}}}}")
        return nodes.Break(token.line) if token.text == "break" else nodes.Continue(token.line)

    def _branches(self, token: Token) -> Node:
        scope = len(self._variables)
        kind = nodes.If if token.text == "if" else nodes.With
        branches: list[nodes.Branch] = []
        otherwise: list[Node] = []
        self._deeper(token.line)
        while True:
            pipe = self._pipeline(token.text, "right")
            body, end = self._list()
            branches.append(nodes.Branch(pipe.line, pipe, body))
            if end.text == "else" and self._skip_space().text == token.text:
                self._take()
                continue
            if end.text == "else":
                self._expect("right", "else")
                otherwise, end = self._list()
            if end.text != "end":
                raise self._unexpected(end, token.text)
            self._expect("right", "end")
            break
        self._depth -= 1
        del self._variables[scope:]
        return kind(token.line, branches, otherwise)

    def _range(self, token: Token) -> Node:
        scope = len(self._variables)
        self._deeper(token.line)
        pipe = self._pipeline("range", "right")
        self._loops += 1
        body, end = self._list()
        self._loops -= 1
        otherwise: list[Node] = []
        if end.text == "else":
            self._expect("right", "else")
            otherwise, end = self._list()
        if end.text != "end":
            raise self._unexpected(end, "range")
        self._expect("right", "end")
        self._depth -= 1
        del self._variables[scope:]
        return nodes.Range(token.line, pipe, body, otherwise)

    def _template_name(self, where: str) -> str:
        token = self._take_solid()
        if token.kind not in ("string", "raw"):
            raise self._unexpected(token, where)
        return unquote(token.text, token.line)

    def _call(self, token: Token) -> Node:
        name = self._template_name("template clause")
        if self._skip_space().kind == "right":
            self._take()
            return nodes.Call(token.line, name, None)
        return nodes.Call(token.line, name, self._pipeline("template clause", "right"))

    def _define(self, token: Token) -> Node | None:
        where = f"{token.text} clause"
        name = self._template_name(where)
        call = None
        if token.text == "block":
            call = nodes.Call(token.line, name, self._pipeline(where, "right"))
        else:
            self._expect("right", where)
            if self._depth:
                raise failure(token.line, "unexpected {{define}}")
        self._deeper(token.line)
        outer, self._variables, loops, self._loops = self._variables, ["$"], self._loops, 0
        body, end = self._list()
        self._variables, self._loops = outer, loops
        if end.text != "end":
            raise self._unexpected(end, where)
        self._expect("right", "end")
        self._depth -= 1
        self._add(name, body, token.line)
        return call

    def _add(self, name: str, body: list[Node], line: int) -> None:
        """A name may be defined twice only when one of the bodies is empty; the other one stays."""
        before = self.templates.get(name)
        if before is None or nodes.is_empty(before):
            self.templates[name] = body
        elif not nodes.is_empty(body):
            raise failure(line, f'multiple definition of template "{name}"')

    def _pipeline(self, where: str, end: str) -> nodes.Pipe:
        token = self._skip_space()
        variables, declares = self._declarations(where)
        commands: list[nodes.Command] = []
        while True:
            first = self._skip_space()
            if first.kind == end:
                self._take()
                if not commands:
                    raise failure(first.line, f"missing value for {where}")
                break
            if first.kind not in _OPERAND_START:
                raise self._unexpected(first, where)
            commands.append(self._command())
        for later in commands[1:]:
            if isinstance(later.args[0], (nodes.Constant, nodes.Dot)):
                raise failure(later.line, f"non executable command in pipeline stage {commands.index(later) + 1}")
        return nodes.Pipe(token.line, variables, declares, commands)

    def _declarations(self, where: str) -> tuple[tuple[str, ...], bool]:
        """`$a :=`, `$a =` or, in range, `$a, $b :=`; nothing is taken when the variable is an operand."""
        start = self._next
        names: list[str] = []
        while self._skip_space().kind == "variable":
            names.append(self._take().text)
            mark = self._skip_space()
            if mark.kind in (":=", "="):
                self._take()
                if len(names) > (2 if where == "range" else 1):
                    raise failure(mark.line, f"too many declarations in {where}")
                self._variables += names  # from here on, also when only assigned to: Go looks closer when it runs
                return tuple(names), mark.kind == ":="
            if mark.kind != "," or where != "range":
                break
            self._take()
        if len(names) > 1:
            raise failure(self._peek().line, "range can only initialize variables")
        self._next = start
        return (), False

    def _check_variable(self, name: str, line: int) -> None:
        if name not in self._variables:
            raise failure(line, f'undefined variable "{name}"')

    def _command(self) -> nodes.Command:
        line = self._peek().line
        args: list[Node] = []
        while True:
            token = self._skip_space()
            if token.kind in _OPERAND_START:
                args.append(self._operand())
                after = self._peek()
                if after.kind == "space":
                    continue
                token = after
            if token.kind in ("right", ")"):
                return nodes.Command(line, args)
            if token.kind == "|":
                self._take()
                return nodes.Command(line, args)
            raise self._unexpected(token, "operand")

    def _operand(self) -> Node:
        node = self._term()
        names: list[str] = []
        while self._peek().kind == "field":
            names.append(self._take().text[1:])
        if not names:
            return node
        if isinstance(node, nodes.Field):
            return nodes.Field(node.line, (*node.names, *names))
        if isinstance(node, nodes.Variable):
            return nodes.Variable(node.line, node.name, tuple(names))
        if isinstance(node, (nodes.Constant, nodes.Dot)):
            raise failure(node.line, f'unexpected . after term "{node.text if isinstance(node, nodes.Constant) else "."}"')
        return nodes.Chain(node.line, node, tuple(names))

    def _term(self) -> Node:
        token = self._take()
        kind, text, line = token
        if kind == "field":
            return nodes.Field(line, (text[1:],))
        if kind == "variable":
            self._check_variable(text, line)
            return nodes.Variable(line, text, ())
        if kind == ".":
            return nodes.Dot(line)
        if kind == "(":
            self._deeper(line)
            pipe = self._pipeline("parenthesized pipeline", ")")
            self._depth -= 1
            return pipe
        if kind == "word" and text in _CONSTANTS:
            return nodes.Constant(line, _CONSTANTS[text], text)
        if kind == "word":
            if text not in self._functions:
                raise failure(line, f'function "{text}" not defined')
            return nodes.Function(line, text)
        if kind == "number":
            return nodes.Constant(line, number(text, line), text)
        if kind == "char":
            return nodes.Constant(line, unquote_char(text, line), text)
        return nodes.Constant(line, unquote(text, line), text)
