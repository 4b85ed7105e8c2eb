"""Spinners and bars by `rich`, imported only where a terminal shows them."""

from __future__ import annotations

import re
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from ollamapy.cli.text import human_bytes, human_duration

_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]+")  # the whole of it would leave no room for a bar


class _Bar(BarColumn):
    def render(self, task: Task) -> RenderableType:  # type: ignore[override]
        return super().render(task) if task.total else Text()


class _Figures(TextColumn):
    """`  33% 90 MB/271 MB  45 MB/s  4 seconds`."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text()
        parts = [f"{task.percentage:3.0f}% {human_bytes(int(task.completed))}/{human_bytes(int(task.total))}"]
        if task.speed and not task.finished:
            parts.append(f"{human_bytes(int(task.speed))}/s")
            parts.append(human_duration(task.time_remaining or 0))
        return Text("  ".join(parts))


class Bars:
    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            _Bar(bar_width=30),
            _Figures(),
            console=Console(stderr=True),
        )
        self._text = ""
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()
        self._progress.stop()

    def step(self, text: str, done: int = 0, total: int = 0) -> None:
        if text != self._text or self._task is None:
            self._finish()
            self._text, self._task = text, self._progress.add_task(_DIGEST.sub(r"\1", text), total=total or None)
        if total:
            self._progress.update(self._task, completed=done, total=total)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            if not task.total:  # a spinner; `total=0` would be a bar
                self._progress.update(self._task, total=0, completed=0)
            self._progress.stop_task(self._task)
