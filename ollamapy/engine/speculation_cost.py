"""What a guess costs and gives: the price of a row in a step, how often guesses come true, how many are worth verifying.

Numbers in, numbers out. Knows no request, no model and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ollamapy.engine.speculation_lookup import Pairs

LEARNING = 1 / 32  # weight of the newest step in the line
LEARNING_ROWS = 1 / 6  # and in the figure of its own number of rows
FORGOTTEN = 1000  # steps after which a number of rows that did not occur is judged by the line again
ROW_SHARE = {"cpu": 0.15}  # of a step of one row, the part that a second row costs again; before anything was measured
ROW_SHARE_ELSEWHERE = 0.02
SPREAD = 0.5  # rows^2: how much the assumed price weighs against the measured one
MARGIN = 1.05  # guesses must promise so much more tokens per second than none
OUTLIER = 3.0  # times the expected seconds: more than this was not the step

BUCKETS = (4, 8)  # matched tokens from which on a guess belongs to the next kind
DRAFT_MODEL = 3  # the kind of guesses of a draft model
FIRST_RATES = (0.3, 0.6, 0.85, 0.7)
RATE_LEARNING = 0.15


class StepCost:
    """Seconds of a step that decodes, by its rows: as measured, and where nothing was, on a line through what was.

    The line is one of least squares that forget, leaning on an assumed share. It is not enough: kernels have thresholds
    (a step of 5 rows of SmolLM2 takes 1.4 times one of 4 on two AVX-512 cores, one of 8 not more than one of 5).
    """

    def __init__(self, device_type: str) -> None:
        self._share = ROW_SHARE.get(device_type, ROW_SHARE_ELSEWHERE)
        self._rows = self._seconds = self._spread = self._joint = 0.0
        self._measured: dict[int, tuple[float, int]] = {}  # rows -> seconds, when
        self._now = 0

    @property
    def known(self) -> bool:
        return self._seconds > 0.0

    def seconds(self, rows: int) -> float:
        """0 before the first step."""
        found, when = self._measured.get(rows, (0.0, 0))
        if found and self._now - when < FORGOTTEN:
            return found
        return self._seconds + self.per_row * (rows - self._rows)

    def observe(self, rows: int, seconds: float) -> None:
        self._now += 1
        if not self._seconds:
            self._rows, self._seconds = float(rows), seconds
            return
        expected = self.seconds(rows)
        seconds = min(seconds, OUTLIER * expected)
        weight = LEARNING_ROWS if rows in self._measured else 1.0
        self._measured[rows] = expected + weight * (seconds - expected), self._now
        off_rows, off_seconds = rows - self._rows, seconds - self._seconds
        self._rows += LEARNING * off_rows
        self._seconds += LEARNING * off_seconds
        self._spread = (1 - LEARNING) * (self._spread + LEARNING * off_rows * off_rows)
        self._joint = (1 - LEARNING) * (self._joint + LEARNING * off_rows * off_seconds)

    @property
    def per_row(self) -> float:
        """Slope of the line."""
        assumed = self._seconds * self._share / (1 - self._share + self._share * self._rows)
        found = (self._joint + SPREAD * assumed) / (self._spread + SPREAD)
        return min(max(found, 0.1 * assumed), self._seconds / max(self._rows, 1.0))


@dataclass(slots=True)
class Track:
    """How often one request's guesses came true, by kind: the length of the match that they follow, or a draft model's; and
    the guess that is open.

    Guesses that were not verified count too: the tokens that came tell.
    """

    rates: list[float] = field(default_factory=lambda: list(FIRST_RATES))
    guess: list[int] = field(default_factory=list)
    bucket: int = 0
    place: int = 0  # tokens generated when the guess was made
    pairs: Pairs = field(default_factory=Pairs)
    failed: bool = False  # guessing did, for this request: it goes without

    def open(self, guess: list[int], bucket: int, place: int) -> None:
        self.guess, self.bucket, self.place = guess, bucket, place

    @staticmethod
    def bucket_of(matched: int) -> int:
        return sum(matched >= least for least in BUCKETS)

    def close(self, came: Sequence[int]) -> None:
        """`came`: the tokens in the places of the guess, as far as they are there."""
        rates = self.rates
        for guessed, token in zip(self.guess, came, strict=False):
            right = guessed == token
            rates[self.bucket] += RATE_LEARNING * (right - rates[self.bucket])
            if not right:
                break
        self.guess = []

    @property
    def rate(self) -> float:
        """The chance of the next token of the open guess, given those before it."""
        return self.rates[self.bucket]


def allot(rates: Sequence[float], lengths: Sequence[int], num_rows: int, most_rows: int, cost: StepCost) -> list[int]:
    """How many of the `lengths[i]` guessed tokens of sequence i to verify, in a step of `num_rows` rows without guesses.

    A guess that comes true is a token more for one row more. The likeliest are taken first, and as many as make the step's
    tokens per second the most.
    """
    counts = [0] * len(rates)
    if not cost.known:
        return counts
    chances = [(rate**place, index) for index, rate in enumerate(rates) for place in range(1, lengths[index] + 1)]
    chances = sorted(chances, reverse=True)[: most_rows - num_rows]
    tokens, best, speed = float(num_rows), 0, MARGIN * num_rows / cost.seconds(num_rows)
    for count, (chance, _) in enumerate(chances, start=1):
        tokens += chance
        own = tokens / cost.seconds(num_rows + count)
        if own > speed:
            best, speed = count, own
    for _, index in chances[:best]:
        counts[index] += 1
    return counts


def rounds(rates: Sequence[float], lengths: Sequence[int], num_rows: int, cost: StepCost, seconds: float) -> int:
    """How many tokens a draft model should guess for each of some sequences of a step of `num_rows` rows, when a round, one
    token of each, takes `seconds`: what makes the most tokens per second of it all. 1 to see what a round takes."""
    if not seconds or not cost.known:
        return min(1, max(lengths))
    tokens, rows, best, speed = float(num_rows), num_rows, 0, MARGIN * num_rows / cost.seconds(num_rows)
    for count in range(1, max(lengths) + 1):
        going = [rate for rate, length in zip(rates, lengths, strict=True) if length >= count]
        tokens += sum(rate**count for rate in going)
        rows += len(going)
        own = tokens / (cost.seconds(rows) + count * seconds)
        if own > speed:
            best, speed = count, own
    return best
