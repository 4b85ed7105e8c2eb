"""Progress of long work on stderr: spinners and bars on a terminal, else a plain line per step."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol


class Steps(Protocol):
    """Steps of which the newest is at work. A context manager: on leaving it, the last step is done."""

    def __enter__(self) -> Steps: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def step(self, text: str, done: int = 0, total: int = 0) -> None:
        """Goes on with the step of this text, or begins it; `done` of `total` bytes, if it is known."""


def steps() -> Steps:
    if sys.stderr.isatty():
        from ollamapy.cli.bars import Bars

        return Bars()
    return Lines()


class Lines:
    """Writes each step once."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def step(self, text: str, done: int = 0, total: int = 0) -> None:
        if text != self._last:
            print(text, file=sys.stderr, flush=True)
            self._last = text
