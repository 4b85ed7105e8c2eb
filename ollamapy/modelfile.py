"""Modelfiles: parsing, printing, and the create request that one stands for. Knows nothing of servers and weights.

    # comment
    FROM llama3.2                    model name, GGUF file or folder; may repeat (weights, projector)
    PARAMETER temperature 0.5        see api/options.py
    SYSTEM \"\"\"several
    lines\"\"\"

Keywords are case-insensitive, in any order. A value goes to the end of the line; one that begins with `"` or `\"\"\"` goes
to the line that ends with the same. There are no escapes. Characters that do not print are dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ollamapy.api import options
from ollamapy.errors import BadRequest, ModelfileError, NotFound
from ollamapy.names import ModelName
from ollamapy.store.files import Progress, hash_file, model_files

if TYPE_CHECKING:
    from ollamapy.store.local import LocalModel

KEYWORDS = (
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "draft",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
)
_EXTENSIONS = ("quantize",)
_SOURCES = {"from": "files", "adapter": "adapters", "draft": "draft_files"}  # instruction -> field of the request
_ROLES = ("system", "user", "assistant")
_WRONG_COMMAND = (
    "command must be one of " + ", ".join(f'"{word}"' for word in KEYWORDS[:-1]) + f', or "{KEYWORDS[-1]}"'
)  # the extension is left out: the text is what clients of Ollama know
_WRONG_ROLE = 'message role must be one of "system", "user", or "assistant"'
_BLANKS = " \t"
_NEWLINES = "\r\n"
_SPACE = _BLANKS + _NEWLINES
_KEY = re.compile(r"[A-Za-z0-9_]*", re.ASCII)
_WORD = re.compile(r"[A-Za-z]*", re.ASCII)
_NEWLINE = re.compile(r"\r?\n|\r")
_SEMVER = re.compile(r"\d+(\.\d+){0,2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", re.ASCII)
_LINE = re.compile(r"[^\r\n]*")


class Command(NamedTuple):
    """One instruction: its keyword in lower case and its value. `key` is a PARAMETER's name or a MESSAGE's role."""

    name: str
    args: str
    key: str = ""

    def __str__(self) -> str:
        words = (self.name.upper(), self.key, quote(self.args))
        return " ".join(word for word in words if word)


class Modelfile(NamedTuple):
    commands: list[Command]

    def __str__(self) -> str:
        """Text that parses to the same commands, if their values can be written at all (see `quote`)."""
        return "".join(f"{command}\n" for command in self.commands)

    def values(self, name: str) -> list[str]:
        return [command.args for command in self.commands if command.name == name]


def quote(value: str) -> str:
    """The value as a Modelfile has it: bare where that reads back the same, else in quotes, triple if it holds any.

    A line inside a value that ends with the closing quotes cannot be written: the language has no escapes.
    """
    if value and "\n" not in value and "\r" not in value and value == value.strip(_SPACE) and value[0] != '"':
        return value
    return f'"""{value}"""' if '"' in value else f'"{value}"'


def parse(text: str | bytes) -> Modelfile:
    """Raises ModelfileError, with the line where there is one. Bytes are UTF-8, or what their byte order mark says."""
    source = _Source(_decode(text) if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    commands = list(_commands(source))
    if not any(command.name == "from" for command in commands):
        raise ModelfileError("no FROM line")
    return Modelfile(commands)


def _decode(data: bytes) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace")
    return data.decode(errors="replace")


class _Source:
    """The text and how far it was read."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def error(self, problem: str) -> ModelfileError:
        before = self.text[: self.position].replace("\r\n", "\n").replace("\r", "\n")
        return ModelfileError(problem, before.count("\n") + 1)

    def peek(self) -> str:
        """The next character; "" at the end."""
        return self.text[self.position : self.position + 1]

    def skip(self, characters: str) -> None:
        while self.position < len(self.text) and self.text[self.position] in characters:
            self.position += 1

    def take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match is not None  # the patterns match nothing, too
        self.position = match.end()
        return match[0]


def _commands(source: _Source) -> Iterator[Command]:
    while True:
        source.skip(_BLANKS + _NEWLINES)
        if not source.peek():
            return
        if source.peek() == "#":
            source.take(_LINE)
            continue
        name = source.take(_WORD).lower()
        if not source.peek():
            raise ModelfileError(f"unexpected EOF: {name}")
        if name not in KEYWORDS + _EXTENSIONS or source.peek() not in _BLANKS:
            raise source.error(_WRONG_COMMAND)
        key = _key(source, name) if name in ("parameter", "message") else ""
        yield Command(name, _value(source), key)


def _key(source: _Source, name: str) -> str:
    source.skip(_BLANKS)
    key = source.take(_KEY if name == "parameter" else _WORD)
    following = source.peek()
    if not following or following not in _BLANKS:
        raise ModelfileError(f"unexpected EOF: {key}")
    if name == "message" and key not in _ROLES:
        raise source.error(_WRONG_ROLE)
    return key


def _value(source: _Source) -> str:
    """From here to the end of the first line at which the quotes are closed. Linear in the text."""
    value = _printing(source.take(_LINE)).lstrip(_SPACE)
    mark = '"""' if value.startswith('"""') else value[:1] if value.startswith('"') else ""
    if not mark:
        return value.rstrip(_SPACE)
    lines, last = [value], value.rstrip(_SPACE)
    closed = len(last) >= 2 * len(mark) and last.endswith(mark)
    while not closed:
        if not source.peek():
            raise ModelfileError("unexpected EOF")
        lines.append(source.take(_NEWLINE))
        lines.append(_printing(source.take(_LINE)))
        closed = lines[-1].rstrip(_SPACE).endswith(mark)
    return "".join(lines).rstrip(_SPACE)[len(mark) : -len(mark)]


def _printing(text: str) -> str:
    return text if text.isprintable() else "".join(c for c in text if c.isprintable() or c in _BLANKS)


def from_model(model: LocalModel, *, system: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """The text of `show --modelfile`. `system` replaces the model's, `options` are merged over its parameters."""
    short = model.name.short()
    header = (
        '# Modelfile generated by "ollama show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        f"# FROM {short}\n\n"
    )
    commands = [Command("from", os.fspath(model.model_path) if model.model_path else short)]
    commands += [Command("adapter", os.fspath(path)) for path in model.adapter_paths]
    commands += [Command("draft", os.fspath(model.draft_path))] if model.draft_path else []
    commands += [Command("from", os.fspath(path)) for path in model.projector_paths]
    texts = {"template": model.template, "system": model.system if system is None else system}
    texts |= {"renderer": model.config.renderer, "parser": model.config.parser}
    commands += [Command(name, text) for name, text in texts.items() if text]
    commands += [Command("parameter", text, name) for name, text in parameter_lines({**model.params, **(options or {})})]
    commands += [Command("license", text) for text in model.licenses]
    commands += [Command("message", message.content or "", message.role) for message in model.messages]
    return header + str(Modelfile(commands))


def parameter_lines(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value as text) of each parameter; lists give one line per element, null gives none."""
    for name, value in params.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool):
                yield name, str(item).lower()
            elif isinstance(item, float) and item.is_integer() and abs(item) < 1e21:
                yield name, str(int(item))
            elif item is not None:
                yield name, str(item)


class Prepared(NamedTuple):
    """What the command line sends: the body of /api/create without the model's name, and files to upload before it."""

    body: dict[str, Any]
    uploads: dict[str, Path]  # digest text -> local file
    warnings: list[str]


HashProgress = Callable[[Path], Progress]


def to_fields(modelfile: Modelfile) -> tuple[dict[str, Any], list[str]]:
    """Fields of a create request, without FROM, ADAPTER and DRAFT; and warnings. Raises ModelfileError, OptionError."""
    fields: dict[str, Any] = {}
    warnings: list[str] = []
    for name, args, key in modelfile.commands:
        if name == "parameter" and key in options.DEPRECATED:
            warnings.append(f"parameter {key} is deprecated")
        elif name == "parameter":
            parameters, value = fields.setdefault("parameters", {}), options.parse_text(key, [args])
            parameters[key] = [*parameters.get(key, []), *value] if isinstance(value, list) else value
        elif name == "message":
            fields.setdefault("messages", []).append({"role": key, "content": args})
        elif name == "license":
            fields.setdefault("license", []).append(args)
        elif name == "requires":
            fields[name] = parse_version(args)
        elif name not in _SOURCES:
            fields[name] = args
    return fields, warnings


def parse_version(text: str) -> str:
    """The version without its "v". ModelfileError unless it is a semantic version, which may be short ("0.14")."""
    version = text.removeprefix("v")
    if not _SEMVER.fullmatch(version):
        raise ModelfileError("requires must be a valid semver (e.g. 0.14.0)")
    return version


def to_request(modelfile: Modelfile, base: Path, hashing: HashProgress | None = None) -> Prepared:
    """Resolves FROM, ADAPTER and DRAFT relative to the Modelfile's folder and hashes the files found.

    A FROM that is no file is a model name. `hashing` makes the progress callback of each file.
    Raises ModelfileError, OptionError, NotFound or BadRequest.
    """
    body, warnings = to_fields(modelfile)
    paths: dict[str, list[Path]] = {name: [] for name in _SOURCES}
    for name, args, _ in modelfile.commands:
        if name in _SOURCES:
            path = base / os.path.expanduser(args)
            if path.exists():
                paths[name].append(path)
            elif name == "from" and ModelName.is_valid(args):
                body["from"] = args
            else:
                raise NotFound(f"{name.upper()} {args}: no such file")
    for path in paths["draft"]:
        if any(path.samefile(other) for other in paths["from"]):
            raise ModelfileError(f"DRAFT must not reference the same local path as FROM: {path}")
    paths["adapter"] = paths["adapter"][-1:]  # a later one replaces
    prepared = Prepared(body, {}, warnings)
    for name, field in _SOURCES.items():
        if paths[name]:
            body[field] = _hash_files(prepared, paths[name], hashing)
    return prepared


def _hash_files(prepared: Prepared, paths: list[Path], hashing: HashProgress | None) -> dict[str, str]:
    """Relative name -> digest text of the files and of the folders' model files."""
    files: dict[str, str] = {}
    for path in paths:
        for name, file in model_files(path).items():
            digest = hash_file(file, hashing(file) if hashing else None).text
            if files.get(name, digest) != digest:
                raise BadRequest(f"two different files are named {name}")
            files[name] = digest
            prepared.uploads[digest] = file
    return files
