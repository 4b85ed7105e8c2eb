"""The spine of every answer: token ids -> engine -> text -> stop strings -> parser -> pieces. Knows no HTTP, no API's shape.

Closing the iterator, by whatever way, aborts the generation; nothing else has to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import NamedTuple, cast

import msgspec

from ollamapy.api.messages import ToolCall
from ollamapy.api.options import Options
from ollamapy.api.types import Logprob, TokenLogprob
from ollamapy.chat.format import ChatEvent, Parser
from ollamapy.engine import protocol
from ollamapy.engine.protocol import Finish, Output, SamplingParams
from ollamapy.errors import OptionError
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.server.record import current
from ollamapy.server.stops import StopFilter
from ollamapy.tokenizer import StreamDecoder, Tokenizer

MAX_REPEATS = 30  # tokens of the same text in a row; a model that goes on like this does not stop by itself
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


class End(NamedTuple):
    """How an answer ended. `reason` is stop, length or repeat; `token_ids` are those shown; times are nanoseconds."""

    reason: str
    token_ids: list[int]
    eval_count: int
    prompt_ns: int
    decode_ns: int
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    drafted_tokens: int = 0  # guessed ahead, and those of them that came true
    accepted_tokens: int = 0
    context_shifts: int = 0


class Piece(NamedTuple):
    """A part of an answer; the last one has `end` and no text."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    end: End | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()  # of the prompt's tokens but the first; before anything else


def sampling(options: Options, tokenizer: Tokenizer, stops: Iterable[str], num_ctx: int) -> SamplingParams:
    """Engine parameters of `options`; stop strings that are one control token become stop ids, as they have no text.

    With DRY it may take some tenths of a second (`Tokenizer.holding`). Raises OptionError.
    """
    if options.repeat_penalty <= 0:
        raise OptionError('option "repeat_penalty" must be greater than 0')
    ids = set(tokenizer.eog_ids)
    for stop in stops:
        encoded = tokenizer.encode(stop) if stop else []
        if len(encoded) == 1 and tokenizer.is_control(encoded[0]):
            ids.add(encoded[0])
    singles, sequences = breakers(tokenizer, options.dry_sequence_breakers) if options.dry_multiplier else ((), ())
    most = 10 * num_ctx
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        typical_p=options.typical_p,
        repeat_last_n=options.repeat_last_n,
        repeat_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        mirostat=options.mirostat,
        mirostat_tau=options.mirostat_tau,
        mirostat_eta=options.mirostat_eta,
        dry_multiplier=options.dry_multiplier,
        dry_base=options.dry_base,
        dry_allowed_length=options.dry_allowed_length,
        dry_penalty_last_n=options.dry_penalty_last_n,
        dry_breakers=singles,
        dry_breaker_sequences=sequences,
        xtc_probability=options.xtc_probability,
        xtc_threshold=options.xtc_threshold,
        seed=options.seed,
        max_tokens=most if options.num_predict < 0 else min(options.num_predict, most),
        stop_ids=tuple(sorted(ids)),
        suppress_ids=tokenizer.suppress_ids,
        context_length=num_ctx,
        num_keep=options.num_keep,
        speculation=options.speculation if options.draft_num_predict else "off",
        num_draft=max(options.draft_num_predict, 0),
    )


def first_logprob(tokenizer: Tokenizer, id: int) -> Logprob:
    """Of a prompt's first token, which nothing predicts."""
    raw = tokenizer.token_bytes(id)
    return Logprob(token=raw.decode(errors="replace"), logprob=None, bytes=list(raw))


def breakers(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Where DRY stops looking back: tokens that hold one of the texts, and the texts that are several tokens."""
    encoded = [tuple(tokenizer.encode(text)) for text in texts if text]
    return tokenizer.holding(texts), tuple(ids for ids in encoded if len(ids) > 1)


async def answer(
    engine: EngineProcess,
    tokenizer: Tokenizer,
    token_ids: list[int],
    params: SamplingParams,
    stops: Iterable[str],
    parser: Parser,
) -> AsyncGenerator[Piece]:
    """Pieces as the engine's steps complete them; one without text comes only for its logprobs. Raises EngineError."""
    text = _Text(tokenizer, stops)
    record = current()
    account = record.answer(len(token_ids), engine.num_waiting)
    start = first = last = time.monotonic_ns()
    latest: Output | None = None
    drafts, shifts = (0, 0), 0
    told: list[Logprob] = []  # of the prompt's tokens
    params = msgspec.structs.replace(params, later=len(record.answers) > 1)
    outputs = cast("AsyncGenerator[Output]", engine.generate(token_ids, params, record.caller))
    async with account.failing():
        async with aclosing(outputs):
            async for latest in outputs:
                last = time.monotonic_ns()
                first = last if not text.token_ids else first
                account.queue_ns = latest.queue_ns or account.queue_ns
                account.cached_tokens = max(account.cached_tokens, (latest.finish or latest).cached_tokens)
                account.took(len(latest.token_ids), last)
                told += [text.logprob(entry) for entry in latest.prompt_logprobs]
                if told and (latest.token_ids or latest.finish is not None):
                    yield Piece(prompt_logprobs=tuple(told))
                    told.clear()
                shown = text.feed(latest)
                drafts, shifts = max(drafts, latest.drafts), max(shifts, latest.num_shifts)
                for piece in _pieces(parser.feed(shown) if shown else [], text.take_logprobs()):
                    yield piece
                if text.ended:
                    break
        for piece in _pieces(parser.feed(text.flush(), done=True), text.take_logprobs()):
            yield piece
    finish = latest.finish if latest is not None else None
    if text.ended or finish is None:
        prompt_ns = max(first - start - account.queue_ns, 0)
        counts = (account.cached_tokens, *drafts, shifts)
        end = End(text.ended or "stop", text.token_ids, text.count, prompt_ns, last - first, *counts)
    else:
        end, account.queue_ns = _end(text, finish), finish.queue_ns
    account.generated(end.reason, end.prompt_ns, end.decode_ns, end.context_shifts)
    yield Piece(end=end)


def _pieces(events: list[ChatEvent], logprobs: tuple[Logprob, ...]) -> list[Piece]:
    if not events:
        return [Piece(logprobs=logprobs)] if logprobs else []
    *before, last = events
    pieces = [Piece(event.content, event.thinking, event.tool_calls) for event in before]
    pieces.append(Piece(last.content, last.thinking, last.tool_calls, logprobs))
    return pieces


def _end(text: _Text, finish: Finish) -> End:
    """By the engine's own account; where a stop string or the repeat guard ends an answer before it does, there is none."""
    return End(
        finish.reason,
        text.token_ids,
        finish.completion_tokens,
        finish.prompt_ns,
        finish.decode_ns,
        cached_tokens=finish.cached_tokens,
        drafted_tokens=finish.drafted_tokens,
        accepted_tokens=finish.accepted_tokens,
        context_shifts=finish.num_shifts,
    )


class _Text:
    """Tokens to text up to a stop string, with the logprobs of the tokens whose text is shown.

    `ended` is "" while the text may go on, else why it may not. `token_ids` are the tokens that are shown, `count` those
    that were generated.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str]) -> None:
        self.token_ids: list[int] = []
        self.count = 0
        self.ended = ""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, continues=True)
        self._stops = StopFilter(stops)
        self._length = 0  # characters decoded
        self._waiting: deque[tuple[int, int, Logprob]] = deque()  # where the token's text begins and ends
        self._ready: list[Logprob] = []
        self._repeated, self._repeats = "", 0

    def feed(self, output: Output) -> str:
        shown = []
        for at, id in enumerate(output.token_ids):
            piece = self._decoder.feed((id,))
            begin, self._length = self._length, self._length + len(piece)
            self.count += 1
            shown.append(self._stops.feed(piece))
            if output.logprobs:
                self._waiting.append((begin, self._length, self.logprob(output.logprobs[at])))
            if self._stops.stopped:
                self.ended = "stop"
                if begin < self._stops.passed:
                    self.token_ids.append(id)
                break
            self.token_ids.append(id)
            if self._repeats_too_often(piece):
                self.ended = "repeat"
                break
        self._release()
        return "".join(shown)

    def flush(self) -> str:
        """What was held back, when nothing more will come."""
        tail = self._stops.feed(self._decoder.flush()) + self._stops.flush()
        if not self._stops.stopped:
            self._ready += [entry for _, _, entry in self._waiting]
            self._waiting.clear()
        return tail

    def take_logprobs(self) -> tuple[Logprob, ...]:
        if not self._ready:
            return ()
        ready, self._ready = self._ready, []
        return tuple(ready)

    def _release(self) -> None:
        """Tokens whose text is shown; after a stop string also the one whose text it cuts."""
        passed, stopped = self._stops.passed, self._stops.stopped
        while self._waiting and (self._waiting[0][1] <= passed or (stopped and self._waiting[0][0] < passed)):
            self._ready.append(self._waiting.popleft()[2])

    def _repeats_too_often(self, piece: str) -> bool:
        trimmed = piece.strip()
        self._repeats = self._repeats + 1 if trimmed == self._repeated else 0
        self._repeated = trimmed
        return self._repeats > MAX_REPEATS

    def logprob(self, given: protocol.TokenLogprob) -> Logprob:
        top = [self._token(id, value) for id, value in given.top]
        chosen = self._token(given.token_id, given.logprob)
        return Logprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)

    def _token(self, id: int, logprob: float) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(id)
        return TokenLogprob(token=raw.decode(errors="replace"), logprob=max(logprob, LOWEST_LOGPROB), bytes=list(raw))
