"""Which tokens wait for the next message, that none is lost or changes its place, and that the real loop sends what waits."""

from __future__ import annotations

import socket
import threading

import pytest

from ollamapy.engine.protocol import (
    Caller,
    Embedding,
    EngineInfo,
    Event,
    Finish,
    Generate,
    Output,
    Plan,
    Ready,
    SamplingParams,
    Shutdown,
    Stats,
    Step,
)
from ollamapy.lifecycle import outbox
from ollamapy.lifecycle.loop import Loop
from ollamapy.lifecycle.outbox import INTERVAL, Outbox
from ollamapy.lifecycle.wire import encode, events

SOON = INTERVAL / 4


def token(request_id: int, id: int, finish: Finish | None = None) -> Step:
    return Step([Output(request_id, [id], finish=finish)])


def sent(data: bytes) -> list[Event]:
    return events().feed(data)


def test_later_tokens_wait_and_keep_their_order() -> None:
    box = Outbox()
    assert sent(box.put([token(1, 10)], 5.0)) == [token(1, 10)]  # the first
    assert box.put([token(1, 11)], 5.0 + SOON) == box.put([], 5.0 + SOON) == b""
    assert box.put([token(1, 12)], 5.0 + 2 * SOON) == b""
    assert sent(box.put([token(1, 13)], 5.0 + INTERVAL)) == [token(1, 11), token(1, 12), token(1, 13)]
    assert box.put([token(1, 14)], 5.0 + INTERVAL + SOON) == b""  # measured from the last message


@pytest.mark.parametrize(
    "urgent",
    [token(2, 20), token(1, 12, Finish("length")), Embedding(3, b"", 1), Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)],
    ids=["first token of another", "end", "embedding", "stats"],
)
def test_what_is_urgent_takes_along_what_waits(urgent: Event) -> None:
    box = Outbox()
    box.put([token(1, 10)], 5.0)
    assert box.put([token(1, 11)], 5.0 + SOON) == b""
    assert sent(box.put([urgent], 5.0 + 2 * SOON)) == [token(1, 11), urgent]


def test_nothing_waits_when_nothing_follows() -> None:
    box = Outbox()
    box.put([token(1, 10)], 5.0)
    assert box.put([token(1, 11)], 5.0 + SOON) == b""
    assert sent(box.put([token(1, 12)], 5.0 + 2 * SOON, last=True)) == [token(1, 11), token(1, 12)]
    assert box.put([], 6.0, last=True) == b""


def test_nothing_sent_is_no_message() -> None:
    box = Outbox()
    box.put([token(1, 10)], 5.0)
    assert box.put([], 5.0 + INTERVAL) == b""
    assert sent(box.put([token(1, 11)], 5.0 + INTERVAL + SOON)) == [token(1, 11)]


def test_a_request_whose_end_was_told_has_a_first_token_again() -> None:
    box = Outbox()
    box.put([token(1, 10)], 5.0)
    box.put([token(1, 11, Finish("stop"))], 5.0 + SOON)
    assert sent(box.put([token(1, 12)], 5.0 + 2 * SOON)) == [token(1, 12)]


class Counting:
    """An engine that gives each request 200 tokens, one per step."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request_id: int, token_ids: list[int], params: SamplingParams, caller: Caller) -> None:
        self.running[request_id] = 0

    def embed(self, request_id: int, token_ids: list[int], caller: Caller) -> None:
        raise AssertionError

    def abort(self, request_id: int) -> None:
        raise AssertionError

    def step(self) -> list[Event]:
        outputs = []
        for request_id, count in list(self.running.items()):
            self.running[request_id] = count + 1
            if count + 1 == 200:
                del self.running[request_id]
            outputs.append(Output(request_id, [count + 1], finish=Finish("length") if count + 1 == 200 else None))
        return [Step(outputs)]

    def stats(self) -> Stats:
        raise AssertionError

    def info(self) -> EngineInfo:
        return EngineInfo("", "cpu", 1, 1, 16, 0, 0, 0, 0)


def test_the_loop_sends_every_token_in_few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "INTERVAL", 3600.0)
    own, other = socket.socketpair()
    loop = threading.Thread(target=Loop(own, Plan(""), lambda plan, progress: Counting()).run)
    loop.start()
    reader = events()
    assert isinstance(reader.feed(other.recv(1 << 16))[0], Ready)
    other.sendall(encode(Generate(1, [1], SamplingParams())))
    tokens: list[int] = []
    messages = 0
    while len(tokens) < 200:
        steps = [event for event in reader.feed(other.recv(1 << 16)) if isinstance(event, Step)]
        tokens += [id for step in steps for output in step.outputs for id in output.token_ids]
        messages += 1
    assert tokens == list(range(1, 201))
    assert messages <= 2, "one for the first token, one for the others with the end"
    other.sendall(encode(Shutdown()))
    loop.join(10)
    assert not loop.is_alive()
    own.close()
    other.close()
