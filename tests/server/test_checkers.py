"""Formats that are hard to check: they cost their own client time, once, and nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ollamapy.api.messages import Tool
from ollamapy.engine.protocol import Caller
from ollamapy.errors import BadRequest, ServerBusy
from ollamapy.server import checkers, structured
from ollamapy.server.record import Record, Totals, enter
from ollamapy.server.structured import Answer, Formats
from ollamapy.server.tools import ToolUse

# Tries a grammar for as long as its pattern says, in place of llguidance: {"type": "string", "pattern": "sleep 0.5"}.
_SLEEPER = """
import json, re, sys, time
print('"ready"', flush=True)
for line in sys.stdin:
    time.sleep(float((re.findall("sleep ([0-9.]+)", line) or ["0"])[0]))
    print(json.dumps("no" if "bad" in line else ""), flush=True)
"""


def hard(seconds: float, number: int = 0) -> dict[str, Any]:
    return {"type": "string", "pattern": f"sleep {seconds}", "title": str(number)}


async def as_client(name: str, work: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
    """What came of it, an error too, and after how many seconds."""
    enter(Record(Totals(), caller=Caller(name)))
    start = time.monotonic()
    try:
        result = await work()
    except (BadRequest, ServerBusy) as error:
        result = error
    return result, time.monotonic() - start


@pytest.fixture(autouse=True)
def sleepers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "COMMAND", (checkers.sys.executable, "-c", _SLEEPER))
    monkeypatch.setattr(checkers, "SECONDS", 0.6)
    monkeypatch.setattr(structured, "TOGETHER", 1.2)


def run(test: Callable[[Formats], Awaitable[None]]) -> None:
    async def main() -> None:
        formats = Formats()
        try:
            await test(formats)
        finally:
            await formats.close()
        assert not formats._checkers._idle and not formats._checkers._busy

    asyncio.run(main())


def test_many_hard_ones_of_one_client_leave_others_a_checker() -> None:
    async def test(formats: Formats) -> None:
        flood = [asyncio.create_task(as_client("a", lambda n=n: formats.check(hard(0.5, n)))) for n in range(8)]  # type: ignore[misc]
        await asyncio.sleep(0.3)
        found, _ = await as_client("b", lambda: formats.check({"type": "string"}))
        assert isinstance(found, Answer) and sum(task.done() for task in flood) < 4
        assert all(isinstance(found, Answer) for found, _ in await asyncio.gather(*flood))
        assert len(formats._checkers._idle) == checkers.CHILDREN

    run(test)


def test_one_that_takes_too_long_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(formats: Formats) -> None:
        found = await asyncio.gather(*(as_client("a", lambda: formats.check(hard(30))) for _ in range(5)))
        assert all("takes more than 0.6 s" in str(error) for error, _ in found)
        assert max(seconds for _, seconds in found) < 2.5, "one of the five tried it"
        error, seconds = await as_client("b", lambda: formats.check(hard(30)))
        assert isinstance(error, BadRequest) and seconds < 0.3
        key = next(iter(formats._remembered))
        formats._remembered[key] = formats._remembered[key][0], time.monotonic()
        _, seconds = await as_client("b", lambda: formats.check(hard(30)))
        assert seconds >= 0.6, "tried again after a while"

    run(test)


def test_whoever_waits_too_long_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "PATIENCE", 0.2)

    async def test(formats: Formats) -> None:
        busy = [asyncio.create_task(as_client(name, lambda n=name: formats.check(hard(0.55, n)))) for name in "ab"]  # type: ignore[misc]
        await asyncio.sleep(0.15)
        error, _ = await as_client("c", lambda: formats.check({"type": "string"}))
        assert isinstance(error, ServerBusy) and error.retry_after
        await asyncio.gather(*busy)
        assert isinstance((await as_client("c", lambda: formats.check({"type": "string"})))[0], Answer)

    run(test)


def test_all_tools_have_their_time_together() -> None:
    def use(schemas: list[dict[str, Any]], required: bool) -> ToolUse:
        named = [{"name": f"t{at}", "parameters": schema} for at, schema in enumerate(schemas)]
        tools = [Tool(type="function", function=function) for function in named]
        return ToolUse(tools, tuple(function["name"] for function in named), required, True)  # type: ignore[misc]

    async def test(formats: Formats) -> None:
        slow = [{"type": "object", "title": f"sleep 0.5 {at}"} for at in range(20)]
        warnings: list[str] = []
        found, seconds = await as_client("a", lambda: use(slow, False).check(formats, warnings))
        assert set(found) == {f"t{at}" for at in range(20)} and seconds < 3
        assert any("those before it took more than" in warning for warning in warnings)
        error, _ = await as_client(
            "a", lambda: use([{"type": "object"}, {"type": "object", "title": "bad"}], True).check(formats, [])
        )
        assert isinstance(error, BadRequest) and str(error) == "tools: t1: invalid format: no"

    run(test)


def test_a_client_that_leaves_leaves_no_answer_behind() -> None:
    async def test(formats: Formats) -> None:
        for _ in range(3):
            gone = asyncio.create_task(as_client("a", lambda: formats.check({"title": "bad", **hard(0.3)})))
            await asyncio.sleep(0.15)
            gone.cancel()
            await asyncio.wait([gone])
            found, _ = await as_client("a", lambda: formats.check(hard(0)))
            assert isinstance(found, Answer)
            formats._remembered.clear()

    run(test)
