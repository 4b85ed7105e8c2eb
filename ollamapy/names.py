"""Model names, as Ollama writes them. Knows nothing of the store or of registries.

    name  = [scheme "://"] [host "/"] [namespace "/"] model [":" tag]

    scheme     http | https             default https
    host       1-350 of alnum _ - . :   default registry.ollama.ai
    namespace  1-80  of alnum _ -       default library
    model      1-80  of alnum _ - .     required
    tag        1-80  of alnum _ - .     default latest

Letters and digits are ASCII. Each part begins with an alnum or "_", so that no part is ever ".", ".." or hidden, and the
four parts can be joined to a path. Case is kept as given and ignored in comparisons.
"""

from __future__ import annotations

import re
from typing import Literal

from ollamapy.errors import BadRequest

DEFAULT_SCHEME = "https"
DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

Source = Literal["", "cloud", "local"]

_PARTS = {
    "scheme": re.compile(r"https?"),
    "host": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"),
    "namespace": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"),
    "model": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
    "tag": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
}


def _invalid() -> BadRequest:
    return BadRequest("invalid model name")


class ModelName:
    """A complete, valid name; there are no others. Equal and hashed without regard to case or scheme.

    `given` is the text it was parsed from, for messages.
    """

    __slots__ = ("_key", "given", "host", "model", "namespace", "scheme", "tag")

    def __init__(
        self, model: str, *, tag: str = "", namespace: str = "", host: str = "", scheme: str = "", given: str = ""
    ) -> None:
        """Empty parts take their defaults. Raises BadRequest."""
        self.scheme = scheme.lower() or DEFAULT_SCHEME
        self.host = host or DEFAULT_HOST
        self.namespace = namespace or DEFAULT_NAMESPACE
        self.model = model
        self.tag = tag or DEFAULT_TAG
        for part, pattern in _PARTS.items():
            if not pattern.fullmatch(getattr(self, part)):
                raise _invalid()
        self._key = tuple(part.lower() for part in self.parts)
        self.given = given or self.short()

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Raises BadRequest ("invalid model name"). A separator with nothing before or behind it makes a name invalid."""
        rest, tag, namespace, host, scheme = text, "", "", "", ""
        if rest.rfind(":") > rest.rfind("/"):
            rest, tag = _cut_last(rest, ":")
        model = rest
        if "/" in rest:
            rest, model = _cut_last(rest, "/")
            namespace = rest
        if "/" in rest:
            rest, namespace = _cut_last(rest, "/")
            scheme, separator, host = rest.rpartition("://")
            if separator and not scheme:
                raise _invalid()
        return cls(model, tag=tag, namespace=namespace, host=host, scheme=scheme, given=text)

    @classmethod
    def is_valid(cls, text: str) -> bool:
        try:
            cls.parse(text)
        except BadRequest:
            return False
        return True

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model, tag: the path of its manifest below `manifests/`."""
        return self.host, self.namespace, self.model, self.tag

    def short(self) -> str:
        """The shortest text that parses to the same name; the tag is always shown."""
        text = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{text}"
        return text if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/{text}"

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def __repr__(self) -> str:
        return f"ModelName({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelName) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __lt__(self, other: ModelName) -> bool:
        return self._key < other._key


def _cut_last(text: str, separator: str) -> tuple[str, str]:
    before, _, after = text.rpartition(separator)
    if not before or not after:
        raise _invalid()
    return before, after


def split_source(text: str) -> tuple[str, Source]:
    """Takes the explicit source off a name: ("gpt-oss:20b", "cloud") of "gpt-oss:20b:cloud" or "gpt-oss:20b-cloud".

    Raises BadRequest where both sources are named.
    """
    base, source = _split_once(text.strip())
    if source and _split_once(base)[1]:
        raise BadRequest("use either :local or :cloud, not both")
    return base, source


def _split_once(text: str) -> tuple[str, Source]:
    base, separator, suffix = text.rpartition(":")
    lowered = suffix.lower()
    if not separator or "/" in suffix:
        return text, ""
    if lowered == "cloud":
        return base, "cloud"
    if lowered == "local":
        return base, "local"
    if lowered.endswith("-cloud"):
        return f"{base}:{suffix[: -len('-cloud')]}", "cloud"
    return text, ""
