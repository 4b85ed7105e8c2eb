"""Stop strings: text in, text out up to where one begins. Knows no tokens."""

from __future__ import annotations

from collections.abc import Iterable


class StopFilter:
    """Passes text on until it holds one of `stops`, which is cut off with all that follows; the one complete first counts.

    An end of the text that may be the beginning of a stop string is held back, so the pieces that `feed` gets do not
    matter. `passed` counts the characters let through; `stopped` says that a stop string was found.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._longest = max(map(len, self._stops), default=0)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.passed = 0
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be shown now; "" for all that comes after a stop string."""
        if self.stopped:
            return ""
        if not self._held and self._firsts.isdisjoint(text):  # most texts: no stop string begins here
            self.passed += len(text)
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            shown = text[: min(found)[1]]
        else:
            shown = text[: self._safe(text)]
            self._held = text[len(shown) :]
        self.passed += len(shown)
        return shown

    def flush(self) -> str:
        """What was held back, when the text has ended."""
        held, self._held = self._held, ""
        self.passed += len(held)
        return held

    def _safe(self, text: str) -> int:
        """Length of the beginning that no stop string can reach into."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
