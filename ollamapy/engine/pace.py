"""Pace: how many prompt tokens a step may take beside sequences that decode, from what steps have cost. Knows no sequence.

A step that also computes a prompt is longer for everybody who waits for a next token. The engine tells what its steps took;
from that come the seconds of a step that only decodes and of a prompt token, and so the chunk with which a step takes
`slowdown` times as long as decoding alone. Beside nobody the whole token budget is used. Short prompts, those that begin and
end in one step, may take SHORT times as much: in a burst of them each waits for those before it, and they are soon done.
Where several wait for a first token, prompts have a share of the time by their number, and a first token counts as much as
FIRST next ones, up to CROWDED: the sooner prompts are done, the more rows a step decodes at a time.
"""

from __future__ import annotations

import math

SHORT = 2.5  # times the share of a chunk
MIN_CHUNK = 8  # prompt tokens of a step, whatever they cost: a prompt moves on
FIRST = 4.0
CROWDED = 0.1  # seconds of a step for prompts of a crowd: with those, who decodes still gets 10 tokens a second
WEIGHT = 0.3  # of the newest observation
FULL = 32  # prompt tokens of a full observation: a step of fewer costs hardly less than one of none, and says little of them
OUTLIER = 4.0  # times what was expected: more than that is counted as that much (a page fault, a busy machine)
LEAST = 0.1  # of a mixed step is its prompt's, though decoding alone should have taken longer
PROBE_AFTER = 1.0  # seconds of mixed steps until one decodes only, to learn anew what that takes


class Pace:
    """`limit`: tokens that a step takes at most. `slowdown` <= 1 turns pacing off."""

    def __init__(self, limit: int, slowdown: float) -> None:
        self.limit, self.slowdown = limit, slowdown
        self._decode: dict[int, float] = {}  # power of two of rows that decode -> seconds of a step with nothing else
        self._guessed: dict[int, float] = {}  # the same from steps that were mixed, where none with nothing else was seen
        self._prompt = math.nan  # seconds of a prompt token
        self._told = 0.0  # prompt tokens that this figure is of; older ones count for less
        self._mixed = 0.0  # seconds of mixed steps since the last that only decoded

    def budget(self, num_rows: int, share: float = 1.0, crowd: float = 0.0) -> int:
        """Prompt tokens beside `num_rows` rows that decode, `share` times as many as a chunk may have; 0 in a step that is to
        show what decoding alone takes. `crowd`: prompts beyond one, for each sequence that decodes."""
        left = self.limit - num_rows
        if num_rows == 0 or self.slowdown <= 1:
            return left
        decode = self._decoding(num_rows)
        if decode == 0.0 or self._mixed > PROBE_AFTER:
            return 0
        if math.isnan(self._prompt):
            return min(left, MIN_CHUNK)
        seconds = max(share * (self.slowdown - 1) * decode, min(FIRST * crowd * decode, CROWDED))
        return min(left, max(MIN_CHUNK, int(seconds / self._prompt)))

    def record(self, num_rows: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took. A failed one that was run again in parts is counted as it was."""
        key = num_rows.bit_length()
        if num_prompt_tokens == 0:
            self._decode[key] = _averaged(self._decode.get(key, math.nan), seconds)
            self._mixed = 0.0
            return
        if num_rows:
            self._mixed += seconds
        decode = self._decoding(num_rows or 1)  # the weights are read for prompts alone, too
        if num_rows and key not in self._decode and not math.isnan(self._prompt):  # one figure follows from the other
            self._guessed[key] = max(decode, seconds - num_prompt_tokens * self._prompt)
            return
        cost = max(seconds - decode, LEAST * seconds) / num_prompt_tokens
        if not math.isnan(self._prompt):
            cost = min(cost, OUTLIER * self._prompt)
            self._told *= (1 - WEIGHT) ** min(num_prompt_tokens / FULL, 1.0)
            cost += (self._prompt - cost) * self._told / (self._told + num_prompt_tokens)
        self._prompt, self._told = cost, self._told + num_prompt_tokens

    def _decoding(self, num_rows: int) -> float:
        """Seconds of a step that only decodes so many rows; where none was seen, no less than of the next fewer. 0: unknown."""
        known = {**self._guessed, **self._decode}
        return next((known[key] for key in range(num_rows.bit_length(), 0, -1) if key in known), 0.0)


def _averaged(average: float, value: float) -> float:
    return value if math.isnan(average) else average + WEIGHT * (min(value, OUTLIER * average) - average)
