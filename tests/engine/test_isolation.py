"""What is wrong with one request ends that request: an exception at each place of a step where its own data are used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ollamapy.engine import dry, execution, mirostat, pooling, prompt_logprobs
from ollamapy.engine.adapters import Adapters
from ollamapy.engine.grammar import Grammar
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.sequence import PenaltyWindow, Sequence
from tests.engine.device import Emulated
from tests.engine.fake import FakeConfig, FakeModel, Run, alone
from tests.engine.test_grammar import lark, vocabulary
from tests.engine.test_speculation import guessing

AT_FAULT = 1
BASE: dict[str, Any] = {"temperature": 0.0, "max_tokens": 120}
ANYTHING = lark(r"start: /(.|\n){400}/")


def raises(*_: object) -> Any:
    raise RuntimeError("broken at /some/path.rs:12")


def broken(own: Any, method: str) -> Any:
    """A copy of a grammar or a window of penalties, one method of which fails."""
    kind = type(
        "Broken", (type(own),), {"__slots__": (), method: property(raises) if method in ("sleeps", "counts") else raises}
    )
    other = object.__new__(kind)
    for each in type(own).__mro__:
        for name in getattr(each, "__slots__", ()):
            if name != method:
                setattr(other, name, getattr(own, name))
    return other


def of_grammar(method: str) -> Callable[[Sequence], None]:
    def breaks(seq: Sequence) -> None:
        assert isinstance(seq.grammar, Grammar)
        seq.grammar = broken(seq.grammar, method)

    return breaks


def of_penalties(method: str) -> Callable[[Sequence], None]:
    def breaks(seq: Sequence) -> None:
        assert isinstance(seq.penalties, PenaltyWindow)
        seq.penalties = broken(seq.penalties, method)

    return breaks


def only(real: Callable[..., Any], find: Callable[..., bool]) -> Callable[..., Any]:
    return lambda *given, **named: raises() if find(*given) else real(*given, **named)


def started(speculation: str, device: bool, **params: object) -> Run:
    """Three requests that have told tokens."""
    run = guessing(Run(FakeModel(memory=1), device=Emulated() if device else None, num_blocks=256))
    run.engine.arrivals.grammars = Grammars(vocabulary)
    for request_id in range(3):
        run.add(request_id, [request_id, 5, 7], **{**BASE, "speculation": speculation, **params})
    while not all(answer.tokens for answer in run.answers.values()):
        run.step()
    return run


def check(run: Run, expected: Run, at_fault: str = "error") -> None:
    run.drain()
    expected.drain()
    for request_id, answer in run.answers.items():
        own = expected.answers[request_id]
        assert answer.finish is not None and own.finish is not None
        if request_id == AT_FAULT and at_fault == "error":
            assert answer.finish.reason == "error" and "the log has the details" in answer.finish.error
            assert "/some/path" not in answer.finish.error and len(answer.tokens) < len(own.tokens)
        else:
            assert (answer.tokens, answer.logprobs, answer.finish.reason) == (own.tokens, own.logprobs, own.finish.reason)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("method", ["allowed", "accept", "num_valid", "copy", "sleeps"])
def test_a_grammar(method: str, speculation: str, device: bool) -> None:
    run, expected = (started(speculation, device, grammar=ANYTHING) for _ in range(2))
    of_grammar(method)(run.engine.scheduler.sequences[AT_FAULT])
    unused = method == "num_valid" or (method == "copy" and speculation == "off")  # what is for guesses alone
    check(run, expected, "goes on" if unused else "error")


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("method", ["append", "counts", "copy"])
def test_penalties(method: str, speculation: str, device: bool) -> None:
    run, expected = (started(speculation, device, repeat_penalty=1.01) for _ in range(2))
    of_penalties(method)(run.engine.scheduler.sequences[AT_FAULT])
    check(run, expected, "goes on" if (method, speculation) == ("copy", "off") else "error")


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_a_guess(monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    """Nobody is ended for it."""
    run, expected = (started("ngram", device) for _ in range(2))
    monkeypatch.setattr(run.engine.scheduler.sequences[AT_FAULT].track, "pairs", None)
    check(run, expected, "goes on")
    finish = run.answers[AT_FAULT].finish
    assert finish is not None and finish.drafted_tokens < 5


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(("module", "name", "params"), [
    (dry, "penalties", {"dry_multiplier": 0.5}),
    (mirostat, "learn", {"mirostat": 2, "temperature": 1.0, "seed": 3}),
    (mirostat, "bound", {"mirostat": 1, "temperature": 1.0, "seed": 3, "logprobs": 2}),
])  # fmt: skip
def test_a_sampler(monkeypatch: pytest.MonkeyPatch, device: bool, module: Any, name: str, params: dict[str, Any]) -> None:
    run, expected = (started("off", device, **params) for _ in range(2))
    expected.drain()
    seq = run.engine.scheduler.sequences[AT_FAULT]

    def is_there(*given: Any) -> bool:
        return any(each is seq or (isinstance(each, list) and seq in each) for each in given)

    monkeypatch.setattr(module, name, only(getattr(module, name), is_there))
    check(run, expected)


def test_logprobs_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told once, though the step that told them is run again."""
    expected = Run(max_batch_tokens=24)
    run = Run(max_batch_tokens=24)
    for each in (expected, run):
        for request_id in range(3):
            each.add(request_id, [request_id, *range(1, 20)], prompt_logprobs=1, max_tokens=3)
    real = prompt_logprobs.tell
    monkeypatch.setattr(execution.prompt_logprobs, "tell", only(real, lambda seq, *_: seq in run_of(run, AT_FAULT)))
    run.drain()
    monkeypatch.undo()
    expected.drain()
    for request_id in (0, 2):
        got, own = run.answers[request_id], expected.answers[request_id]
        assert (got.prompt_logprobs, got.tokens) == (own.prompt_logprobs, own.tokens) and len(got.prompt_logprobs) == 19
    finish = run.answers[AT_FAULT].finish
    assert finish is not None and finish.reason == "error"


def run_of(run: Run, request_id: int) -> list[Sequence]:
    found = run.engine.scheduler.sequences.get(request_id)
    return [] if found is None else [found]


def test_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others in the middle of theirs: what these have summed up is summed once."""
    run, expected = (Run(FakeModel(FakeConfig(pooling_type="mean")), max_batch_tokens=16) for _ in range(2))
    real = pooling.pool
    for each in (expected, run):
        for request_id in range(3):
            each.embed(request_id, [request_id, *range(1, 30)])
    monkeypatch.setattr(pooling, "pool", only(real, lambda seq, _: seq in run_of(run, AT_FAULT)))
    run.drain()
    expected.drain()
    for request_id, answer in run.answers.items():
        assert answer.embedding is not None
        if request_id == AT_FAULT:
            assert "the log has the details" in answer.embedding.error
        else:
            wanted = expected.answers[request_id].embedding
            assert wanted is not None and not answer.embedding.error
            assert (answer.embedding.vector, answer.embedding.num_tokens) == (wanted.vector, wanted.num_tokens)


def test_adapters_that_cannot_be_loaded() -> None:
    """By whatever exception. While they are loaded, the others get their tokens; what failed is tried again."""
    run = Run()
    loads: list[str] = []
    may_load = threading.Event()

    def load(path: str) -> Any:
        assert may_load.wait(60)
        loads.append(path)
        raise {"a": torch.OutOfMemoryError("of 4 GiB"), "b": ValueError("at /some/path")}[path]

    run.engine.arrivals.adapters = Adapters(load)
    run.add(0, [1, 2, 3], max_tokens=4)
    run.add(1, [1, 2, 3], adapters=(("a", 1.0),))
    run.add(2, [1, 2, 3], adapters=(("a", 1.0), ("b", 1.0)))
    for _ in range(4):
        run.step()
    assert len(run.answers[0].tokens) == 4 and not loads and run.engine.stats().num_waiting == 2
    may_load.set()
    answers = run.drain()
    errors = [answers[i].finish.error for i in (1, 2)]  # type: ignore[union-attr]
    assert all("ran out of memory" in error for error in errors)
    run.add(3, [1, 2, 3], adapters=(("a", 1.0),))
    run.drain()
    assert loads.count("a") == 2, "once for those that wait together, and again"


def test_who_leaves_meanwhile_is_gone() -> None:
    run = Run()
    may_load = threading.Event()
    run.engine.arrivals.adapters = Adapters(lambda _: may_load.wait(60) and Nothing())
    for request_id in range(2):
        run.add(request_id, [1, 2, 3], adapters=(("a", 1.0),), max_tokens=3)
    run.step()
    run.engine.abort(0)
    may_load.set()
    answers = run.drain()
    assert [answer.finish.reason for answer in answers.values() if answer.finish] == ["abort", "length"]
    assert answers[1].tokens == alone([1, 2, 3], max_tokens=3).tokens


class Nothing:
    """An adapter that adds nothing."""

    def add(self, *_: object) -> None:
        pass
