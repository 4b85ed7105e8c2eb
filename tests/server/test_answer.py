"""The spine, on a real tokenizer and a scripted engine: text, stops, logprobs, counts, and its closing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollamapy.api.options import Options
from ollamapy.chat.interface import PlainParser
from ollamapy.chat.thinking import DEFAULT_TAGS, ThinkingParser
from ollamapy.engine.protocol import Caller, Finish, Output, SamplingParams, TokenLogprob
from ollamapy.errors import EngineError
from ollamapy.gguf.reader import GGUFFile
from ollamapy.server.answer import LOWEST_LOGPROB, MAX_REPEATS, Piece, answer, sampling
from ollamapy.server.record import Record, Totals, enter
from ollamapy.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    with GGUFFile.open(smollm2_path) as file:
        return Tokenizer.from_gguf(file.metadata)


class Scripted:
    """Gives these tokens, `step` at a time; fails after them if told to."""

    num_waiting = 0

    def __init__(self, ids: Sequence[int], step: int = 1, *, logprobs: bool = False, failure: str = "") -> None:
        self.ids, self.step, self.logprobs, self.failure = list(ids), step, logprobs, failure
        self.given = 0
        self.closed = False

    async def generate(self, token_ids: list[int], params: SamplingParams, caller: Caller) -> AsyncIterator[Output]:
        counts = {"cached_tokens": 2, "drafted_tokens": 13, "accepted_tokens": 11, "num_shifts": 17}
        try:
            for at in range(0, len(self.ids), self.step):
                part = self.ids[at : at + self.step]
                self.given += len(part)
                last = self.given == len(self.ids) and not self.failure
                entries = [TokenLogprob(id, -float("inf") if id == part[0] else -1.0, [(id, -1.0)]) for id in part]
                ended = Finish("length", completion_tokens=len(self.ids), prompt_ns=5, decode_ns=7, **counts)
                cached = 0 if at else counts["cached_tokens"]
                yield Output(1, part, entries if self.logprobs else [], ended if last else None, cached_tokens=cached)
                await asyncio.sleep(0)
            if self.failure:
                raise EngineError(self.failure)
        finally:
            self.closed = True


def run(engine: Scripted, tokenizer: Tokenizer, stops: Sequence[str] = (), parser: Any = None) -> list[Piece]:
    async def collect() -> list[Piece]:
        pieces = answer(engine, tokenizer, [1], SamplingParams(), stops, parser or PlainParser())  # type: ignore[arg-type]
        return [piece async for piece in pieces]

    return asyncio.run(collect())


TEXT = "Grüße 👩‍👩‍👧 an alle! 日本語 and\n\nthe END of it."


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_the_text_does_not_depend_on_the_steps(tokenizer: Tokenizer, step: int) -> None:
    ids = tokenizer.encode(TEXT)
    engine = Scripted(ids, step)
    *pieces, last = run(engine, tokenizer)
    assert "".join(piece.content for piece in pieces) == TEXT and all("\ufffd" not in piece.content for piece in pieces)
    assert last.end is not None and last.end.token_ids == ids and last.content == ""
    assert (last.end.reason, last.end.eval_count, last.end.prompt_ns, last.end.decode_ns) == ("length", len(ids), 5, 7)
    assert (last.end.cached_tokens, last.end.drafted_tokens, last.end.accepted_tokens) == (2, 13, 11)
    assert last.end.context_shifts == 17 and engine.closed


@pytest.mark.parametrize(("given", "stops", "reason"), [(TEXT, ["e EN"], "stop"), (" again" * 200, [], "repeat")])
def test_what_we_end_ourselves_is_accounted_for(tokenizer: Tokenizer, given: str, stops: list[str], reason: str) -> None:
    """Its times are ours, less what it waited; guesses and shifts are those told on the way."""
    totals = Totals()
    record = Record(totals)
    record.begin("m")

    class Slow(Scripted):
        async def generate(self, token_ids: list[int], params: SamplingParams, caller: Caller) -> AsyncIterator[Output]:
            async for output in super().generate(token_ids, params, caller):
                queued = 0 if self.given > 1 else 10**12
                yield msgspec.structs.replace(output, queue_ns=queued, drafts=(self.given, 1), num_shifts=self.given // 5)
                await asyncio.sleep(0.002)

    async def collect() -> Piece:
        enter(record)
        pieces = answer(Slow(tokenizer.encode(given)), tokenizer, [1], SamplingParams(), stops, PlainParser())  # type: ignore[arg-type]
        return [piece async for piece in pieces][-1]

    end = asyncio.run(collect()).end
    assert end is not None and end.reason == reason
    assert end.prompt_ns == 0, "nothing is left of its time but the wait"
    assert end.decode_ns >= 2_000_000 * (end.eval_count - 1)
    assert end.drafted_tokens == end.eval_count and end.context_shifts == end.eval_count // 5 > 0
    record.close()
    figures = totals.models["m"]
    assert figures.queue.sum == pytest.approx(1000) and figures.prefill.counts[0] == 1
    assert figures.decode.sum == pytest.approx(end.decode_ns / 1e9) and figures.context_shifts == end.context_shifts
    assert figures.inference.sum == pytest.approx((end.prompt_ns + end.decode_ns) / 1e9)
    assert figures.per_token.sum == pytest.approx(end.decode_ns / 1e9 / (end.eval_count - 1))
    assert figures.finished == {reason: 1}


def test_later_answers_of_a_request_are_told_to_the_engine(tokenizer: Tokenizer) -> None:
    seen: list[bool] = []

    class Seeing(Scripted):
        async def generate(self, token_ids: list[int], params: SamplingParams, caller: Caller) -> AsyncIterator[Output]:
            seen.append(params.later)
            async for output in super().generate(token_ids, params, caller):
                yield output

    async def collect() -> None:
        enter(Record(Totals()))
        for _ in range(3):
            engine = Seeing(tokenizer.encode("one"))
            async for _ in answer(engine, tokenizer, [1], SamplingParams(), (), PlainParser()):  # type: ignore[arg-type]
                pass

    asyncio.run(collect())
    assert seen == [False, True, True]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stop_string_ends_it(tokenizer: Tokenizer, step: int) -> None:
    ids = tokenizer.encode(TEXT)
    engine = Scripted(ids, step, logprobs=True)
    *pieces, last = run(engine, tokenizer, ["never", "e EN"])
    shown = TEXT[: TEXT.index("e EN")]
    assert "".join(piece.content for piece in pieces) == shown
    assert last.end is not None and last.end.reason == "stop"
    assert tokenizer.decode(last.end.token_ids).startswith(shown) and len(last.end.token_ids) < len(ids)
    logged = "".join(bytes(e.bytes).decode("latin-1") for p in pieces for e in p.logprobs)
    assert logged == tokenizer.decode(last.end.token_ids).encode().decode("latin-1")  # the tokens shown, the last one in part
    assert engine.closed and (step > 3 or engine.given < len(ids))


def test_logprobs_come_with_their_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    pieces = run(Scripted(ids, logprobs=True), tokenizer, ["of it?"])
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert len(entries) == len(ids) and b"".join(bytes(e.bytes) for e in entries) == TEXT.encode()
    assert min(entry.logprob for entry in entries) == LOWEST_LOGPROB
    seen = ""
    for piece in pieces:
        seen += piece.content
        logged = b"".join(bytes(e.bytes) for p in pieces[: pieces.index(piece) + 1] for e in p.logprobs)
        assert len(logged) <= len(seen.encode()) + 3, "no token is told before its text, but for parts of a character"


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 👩")[:-1]
    *pieces, _ = run(Scripted(ids), tokenizer)
    text = "".join(piece.content for piece in pieces)
    assert text.startswith("ok") and text.endswith("\ufffd")


def test_the_repeat_guard(tokenizer: Tokenizer) -> None:
    (dash,) = tokenizer.encode(" again")
    engine = Scripted([dash] * 200)
    *_, last = run(engine, tokenizer)
    assert last.end is not None and last.end.reason == "repeat"
    assert last.end.eval_count == engine.given == MAX_REPEATS + 2
    alternating = tokenizer.encode(" one two" * 60)
    *_, last = run(Scripted(alternating), tokenizer)
    assert last.end is not None and last.end.reason == "length"


def test_thinking_is_told_from_content(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>Well, now.</think>\n\nYes.")
    for step in (1, 4, 100):
        pieces = run(Scripted(ids, step), tokenizer, parser=ThinkingParser(DEFAULT_TAGS))
        assert "".join(piece.thinking for piece in pieces) == "Well, now."
        assert "".join(piece.content for piece in pieces) == "Yes."


def test_an_engine_error_comes_after_what_was_said(tokenizer: Tokenizer) -> None:
    async def collect() -> str:
        said = ""
        engine = Scripted(tokenizer.encode("one two three"), failure="it broke")
        with pytest.raises(EngineError, match="it broke"):
            async for piece in answer(engine, tokenizer, [1], SamplingParams(), (), PlainParser()):  # type: ignore[arg-type]
                said += piece.content
        return said

    assert asyncio.run(collect()) == "one two three"


def test_closing_it_closes_the_engine_s_iterator(tokenizer: Tokenizer) -> None:
    async def leave() -> Scripted:
        engine = Scripted(tokenizer.encode("one two three four five"))
        async with aclosing(answer(engine, tokenizer, [1], SamplingParams(), (), PlainParser())) as pieces:  # type: ignore[arg-type]
            await anext(pieces)
        return engine

    engine = asyncio.run(leave())
    assert engine.closed and engine.given < 5


def test_sampling(tokenizer: Tokenizer) -> None:
    params = sampling(Options(num_predict=-1, top_k=3), tokenizer, ["<|im_end|>", "<|im_start|>", "text"], 100)
    assert params.max_tokens == 1000 and params.top_k == 3 and params.context_length == 100
    assert set(params.stop_ids) >= {tokenizer.eos_id, *tokenizer.encode("<|im_start|>")}
    assert sampling(Options(num_predict=5000), tokenizer, (), 100).max_tokens == 1000
    assert sampling(Options(num_predict=7), tokenizer, (), 100).max_tokens == 7


def test_breakers_are_found_and_do_not_keep_their_tokenizer(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        own = Tokenizer.from_gguf(file.metadata)
    options = Options(dry_multiplier=1.0, dry_sequence_breakers=("\n", "", "two words"))
    params = sampling(options, own, (), 64)
    newlines = {id for id in range(own.vocab_size) if b"\n" in own.token_bytes(id)}
    assert newlines and set(params.dry_breakers) == newlines | set(own.holding(("two words",)))
    assert params.dry_breaker_sequences == (tuple(own.encode("two words")),)
    assert own.holding(options.dry_sequence_breakers) is own.holding(options.dry_sequence_breakers)
    for number in range(20):
        own.holding((f"{number}",))
    assert len(own._holding) == 8
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None
