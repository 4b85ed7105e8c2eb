"""What one rendering may use: steps, time, text. Shared by the Go and the Jinja templates."""

from __future__ import annotations

import time

from ollamapy.errors import TemplateError

MAX_STEPS = 1_000_000
MAX_OUTPUT = 4 << 20  # characters of the result, and of any single text on the way
MAX_DEPTH = 64  # templates calling templates, macros calling macros
MAX_SECONDS = 1.0
CHARACTERS_PER_STEP = 64  # so at most 64 Mi characters are made in all


class Budget:
    """Counts down; every method raises TemplateError when a limit is passed."""

    __slots__ = ("_checks", "deadline", "depth", "output", "steps")

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.output = MAX_OUTPUT
        self.depth = 0
        self.deadline = time.monotonic() + MAX_SECONDS
        self._checks = 0

    def step(self, count: int = 1) -> None:
        """`count` units of work. The clock is read every 256 calls, and after any large unit."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(f"template ran more than {MAX_STEPS} steps")
        self._checks += 1
        if self._checks & 255 == 0 or count > 255:
            self.check_time()

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateError(f"template ran longer than {MAX_SECONDS:g} s")

    def make(self, size: int) -> None:
        """A text or list of `size` characters or elements is about to be made."""
        if size > MAX_OUTPUT:
            raise TemplateError(f"template made a value of more than {MAX_OUTPUT} characters")
        self.step(1 + size // CHARACTERS_PER_STEP)

    def emit(self, size: int) -> None:
        """`size` characters more of the result."""
        self.output -= size
        if self.output < 0:
            raise TemplateError(f"template wrote more than {MAX_OUTPUT} characters")

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TemplateError(f"template calls itself more than {MAX_DEPTH} deep")

    def leave(self) -> None:
        self.depth -= 1
