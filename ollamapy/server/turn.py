"""One request for text, from its name to its pieces: checks in Ollama's order, load, prompt, answer. Knows no API's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import msgspec

from ollamapy.api import options as option_table
from ollamapy.api.decode import lifetime
from ollamapy.api.options import Options
from ollamapy.api.types import DebugInfo, Inference
from ollamapy.chat.format import ChatFormat, Think
from ollamapy.chat.interface import PlainParser
from ollamapy.engine.protocol import SamplingParams
from ollamapy.errors import BadRequest, NotSupported
from ollamapy.lifecycle.resident import LoadedModel
from ollamapy.server.answer import Piece, answer, first_logprob, sampling
from ollamapy.server.caller import with_tier
from ollamapy.server.catalog import Services
from ollamapy.server.choices import Once
from ollamapy.server.prompt import Prompt, Room
from ollamapy.server.record import current
from ollamapy.server.tools import ToolUse
from ollamapy.store.library import LocalModel
from ollamapy.tokenizer import Tokenizer

T = TypeVar("T")
_MORE: dict[str, Any] = {"done": False}
_INLINE_BYTES = 8192  # the prompt of a longer request is rendered and encoded in a thread


@dataclass(frozen=True, slots=True)
class Turn:
    """What differs between generate and chat.

    `empty`: nothing is asked, the model is only loaded or unloaded. `needs`: capability -> error text when it is missing.
    `conflict`: what is wrong with the request itself. `unsupported`: a feature it asks for that is not built yet.
    `echo`: the first piece is the prompt.
    `prompt` makes the prompt; without a parser the text is passed as it is.
    """

    empty: bool
    needs: dict[str, str]
    prompt: Callable[[LocalModel, ChatFormat, Think, Tokenizer, Room], Prompt]
    template: str = ""
    raw: bool = False
    conflict: str = ""
    unsupported: str = ""
    echo: bool = False
    tools: ToolUse | None = None
    once: Once[Prompt] = field(default_factory=Once)  # shared with the other choices of the same prompt


class Said(NamedTuple):
    """A piece and what its line says besides: `fields` are those of `api.types.Reply`."""

    piece: Piece
    fields: dict[str, Any]
    context: list[int]


def timestamp() -> str:
    """Now, as RFC 3339 in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{_second(seconds)}.{nanoseconds:09d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


async def run(services: Services, request: Inference, turn: Turn, warnings: list[str]) -> AsyncGenerator[Said]:
    """The answer's pieces. `warnings` is complete when the first one comes."""
    arrival = time.monotonic_ns()
    record = current()
    record.caller = with_tier(record.caller, request.service_tier)
    model = await services.open(request.model)
    keep_alive = lifetime(request.keep_alive)
    if turn.empty and keep_alive == 0:
        await services.residents.unload(model)
        yield _said(done_reason="unload")
        return
    think = await _check(services, model, request, turn)
    default = {"speculation": services.settings.speculation}
    options, notes = option_table.merge(default, model.params, request.options)
    held_to = await services.formats.check(_format(request, options))
    calls = await turn.tools.check(services.formats, warnings) if turn.tools and turn.tools.required else {}
    warnings += notes
    async with services.residents.use(model, options, keep_alive, record.caller.client) as loaded:
        load_ns = time.monotonic_ns() - arrival
        if turn.empty:
            yield _said(done_reason="load")
            return
        if options.num_ctx > loaded.max_context:
            warnings.append(f"num_ctx: {options.num_ctx} is more than this model has here: {loaded.max_context} is used")
        slow = _is_slow(turn, model, record.body_bytes)
        chat = await _in_thread_if(slow, services.format, loaded, turn.template)
        style = chat.call_style
        if turn.tools and style is None:
            raise BadRequest(f"tools: the way in which {request.model} writes calls is not supported")
        room = _room(options, request, loaded)
        parts = (model, chat, think, loaded.tokenizer, room)
        prompt = await turn.once.get((loaded.tokenizer, room), lambda: _in_thread_if(slow, turn.prompt, *parts))
        if prompt.num_cut:
            record.cut_tokens = prompt.num_cut
            warnings.append(f"the prompt was truncated: {prompt.num_cut} of its {prompt.total} tokens were cut")
        if request.debug_render_only:
            yield Said(Piece(), {"done": True, "debug_info": DebugInfo(rendered_template=prompt.text)}, [])
            return
        parser = PlainParser() if turn.raw else chat.parser(prompt=prompt.text, think=think)
        stops = (*options.stop, *(() if turn.raw else chat.stops))
        grammar = held_to.grammar(parser) if held_to else ""
        trigger = None
        if turn.tools and style is not None:
            if calls:
                grammar = turn.tools.grammar(style, calls, parser, loaded.tokenizer)
            elif not grammar:
                grammar, trigger = await turn.tools.sleeping(style, parser, loaded.tokenizer, services.formats, warnings)
            parser = turn.tools.parser(style, parser)
        params = await _in_thread_if(bool(options.dry_multiplier), _params, loaded, options, request, stops, grammar)
        params = msgspec.structs.replace(params, trigger=trigger)
        if turn.echo:
            first = (first_logprob(loaded.tokenizer, prompt.ids[0]),) if params.logprobs >= 0 and prompt.ids else ()
            yield Said(Piece(prompt.text, prompt_logprobs=first), _MORE, [])
            params = msgspec.structs.replace(params, prompt_logprobs=params.logprobs)
        async with aclosing(answer(loaded.engine, loaded.tokenizer, prompt.ids, params, stops, parser)) as pieces:
            async for piece in pieces:
                if piece.end is None:
                    yield Said(piece, _MORE, [])
                else:
                    yield _last(piece, prompt, arrival, load_ns)


def _params(
    loaded: LoadedModel[LocalModel], options: Options, request: Inference, stops: tuple[str, ...], grammar: str
) -> SamplingParams:
    params = sampling(options, loaded.tokenizer, stops, _num_ctx(options, loaded))
    logprobs = request.top_logprobs if request.logprobs else -1
    bias = tuple((int(id), value) for id, value in request.logit_bias.items())
    if beyond := [id for id, _ in bias if id >= loaded.tokenizer.vocab_size]:
        raise BadRequest(f"logit_bias: token {beyond[0]} is not in the vocabulary of {loaded.tokenizer.vocab_size}")
    adapters = tuple((str(path), 1.0) for path in loaded.model.adapter_paths)
    params = msgspec.structs.replace(params, shift=request.shift, logprobs=logprobs, grammar=grammar)
    return msgspec.structs.replace(params, logit_bias=bias, adapters=adapters, cache_salt=request.cache_salt)


def _format(request: Inference, options: Options) -> Any:
    """The request's own comes before the model's PARAMETER grammar. Raises BadRequest for two of its own."""
    if request.format in (None, ""):
        grammar = request.grammar or options.grammar
        return {"grammar": grammar} if grammar else None
    if request.grammar or request.options.get("grammar"):
        raise BadRequest("format and grammar: an answer can be held to only one of them")
    return request.format


async def _check(services: Services, model: LocalModel, request: Inference, turn: Turn) -> Think:
    """Refuses what the model or this server cannot do. Returns the `think` in force."""
    if model.config.remote_host:
        raise NotSupported(f"cloud models are not supported: {request.model}")
    if turn.conflict:
        raise BadRequest(turn.conflict)
    able = await services.capabilities(model)
    if request.think and "thinking" not in able:
        raise BadRequest(f'"{request.model}" does not support thinking')
    for capability, text in turn.needs.items():
        if capability not in able:
            raise BadRequest(text)
    if turn.unsupported:
        raise NotSupported(f"{turn.unsupported}: not supported yet")
    if request.think is None and "thinking" in able:
        return True
    return request.think


def _room(options: Options, request: Inference, loaded: LoadedModel[LocalModel]) -> Room:
    return Room(_num_ctx(options, loaded), options.num_keep, request.truncate, request.shift)


def _num_ctx(options: Options, loaded: LoadedModel[LocalModel]) -> int:
    return min(options.num_ctx or loaded.context_length, loaded.max_context)


def _is_slow(turn: Turn, model: LocalModel, body_bytes: int) -> bool:
    """Whether the prompt may take long to make: by its length, or as a template of its own may run for a second."""
    own = len(model.system) + sum(len(message.content or "") for message in model.messages)
    return bool(turn.template) or body_bytes + own > _INLINE_BYTES


async def _in_thread_if(long: bool, make: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.to_thread(make, *arguments) if long else make(*arguments)


def _said(**fields: Any) -> Said:
    return Said(Piece(), {"done": True, **fields}, [])


def _last(piece: Piece, prompt: Prompt, arrival: int, load_ns: int) -> Said:
    end = piece.end
    assert end is not None
    cut = {"truncated": True, "prompt_tokens_total": prompt.total} if prompt.num_cut else {}
    fields = {
        "done": True,
        "done_reason": end.reason,
        "total_duration": time.monotonic_ns() - arrival,
        "load_duration": load_ns,
        "prompt_eval_count": len(prompt.ids),
        "prompt_eval_cached_count": end.cached_tokens,
        "prompt_eval_duration": end.prompt_ns,
        "eval_count": end.eval_count,
        "eval_duration": end.decode_ns,
        "context_shifts": end.context_shifts,
        "draft_count": end.drafted_tokens,
        "draft_accepted_count": end.accepted_tokens,
        **cut,
    }
    return Said(piece, fields, [*prompt.ids, *end.token_ids])
