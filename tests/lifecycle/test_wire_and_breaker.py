"""Frames in awkward pieces, and the breaker's clock."""

from __future__ import annotations

import msgspec
import pytest

from ollamapy.engine.protocol import MAX_FRAME, Abort, Command, Event, Generate, GetStats, Output, SamplingParams, Step
from ollamapy.errors import EngineError
from ollamapy.lifecycle.breaker import Breaker
from ollamapy.lifecycle.wire import FrameReader, commands, encode, events


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 1000, 1 << 20])
def test_frames_come_out_whole_whatever_the_pieces(piece: int) -> None:
    sent: list[Command] = [
        Generate(1, list(range(300)), SamplingParams(seed=3)),
        GetStats(),
        Abort(1),
        Generate(2, [], SamplingParams()),
    ]
    data = b"".join(map(encode, sent))
    reader = commands()
    received = [message for start in range(0, len(data), piece) for message in reader.feed(data[start : start + piece])]
    assert received == sent


def test_nothing_comes_out_before_its_last_byte() -> None:
    data = encode(Step([Output(7, [1, 2])]))
    reader = events()
    assert reader.feed(data[:-1]) == []
    assert reader.feed(data[-1:]) == [Step([Output(7, [1, 2])])]
    assert reader.feed(b"") == []


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="the most is"):
        events().feed((MAX_FRAME + 1).to_bytes(4, "little"))
    with pytest.raises(msgspec.DecodeError):
        events().feed(b"\x01\0\0\0\xc1")
    reader: FrameReader[Event] = FrameReader(Event)
    with pytest.raises(msgspec.ValidationError):
        reader.feed(encode(GetStats()))


def test_breaker() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for now[0] in (0.0, 10.0, 61.0):  # three, but not within 60 s
        breaker.record("a", f"at {now}")
        breaker.check("a")
    now[0] = 65.0
    breaker.record("a", "the last")
    for now[0] in (65.0, 94.9):
        with pytest.raises(EngineError, match="the last"):
            breaker.check("a")
        breaker.check("b")
    now[0] = 95.1
    breaker.check("a")
    breaker.record("a", "again")  # at 61, 65 and 95: rests at once
    with pytest.raises(EngineError, match="again"):
        breaker.check("a")
    now[0] = 500.0
    breaker.check("a")
    breaker.record("a", "after a long time")
    breaker.check("a")
