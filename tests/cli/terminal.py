"""A program on a pseudo-terminal: types keys, waits for text, answers the terminal's own questions."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ENTER, INTERRUPT, END, NEWLINE, EDITOR = "\r", "\x03", "\x04", "\n", "\x07"
PASTE = ("\x1b[200~", "\x1b[201~")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[=>()][0AB]?")
_WHERE = b"\x1b[6n"  # the program asks for the cursor's position


class Terminal:
    def __init__(
        self, command: Sequence[str], environment: dict[str, str], cwd: Path, size: tuple[int, int] = (24, 100)
    ) -> None:
        self._fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        environment = {**environment, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)
        self.raw = b""
        self._seen = 0  # of the text, up to the last thing that was waited for

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)

    @property
    def text(self) -> str:
        """All that was shown, without control sequences."""
        return _ESCAPES.sub("", self.raw.decode(errors="replace")).replace("\r\n", "\n")

    def send(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def line(self, text: str) -> None:
        """Types a line at the prompt."""
        self.send(text + ENTER)

    def wait(self, text: str, seconds: float = 20) -> str:
        """Waits for `text` after the last thing waited for; returns what came before it."""
        deadline = time.monotonic() + seconds
        while (at := self.text.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not come; there was {self.text[self._seen :]!r}"
            assert self._read(0.2), f"{text!r} did not come before the end; there was {self.text[self._seen :]!r}"
        before = self.text[self._seen : at]
        self._seen = at + len(text)
        return before

    def prompt(self) -> str:
        """Waits until the program reads a line; returns what it said before."""
        return self.wait("Send a message (/? for help)")

    def ended(self, seconds: float = 10) -> int:
        """Waits for the program's end; its exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self._readable(0):
            assert time.monotonic() < deadline, "the program goes on"
            if not self._read(0.1):
                break
        return self.process.wait(seconds)

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._fd], [], [], seconds)[0])

    def _read(self, seconds: float) -> bool:
        """Reads what there is within `seconds`; False at the end."""
        if not self._readable(seconds):
            return True
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        for _ in range(data.count(_WHERE)):
            self.send("\x1b[1;1R")
        return bool(data)
