"""Requests and responses of Ollama's API, as they go over the wire. No behaviour besides decoding rules.

A field without a default is always written; one with a default is left out while it has that value. In requests null
means absent. Durations are integer nanoseconds; times are RFC 3339 text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollamapy.api.decode import check_bias, lifetime
from ollamapy.api.messages import AnswerMessage, Message, Tool, ToolCall
from ollamapy.errors import BadRequest

MAX_TOP_LOGPROBS = 20
THINK_LEVELS = ("high", "medium", "low", "max")


class Inference(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What /api/generate and /api/chat have in common. `options` is checked by `api.options`."""

    model: str = ""
    stream: bool = True
    format: Any = None
    options: dict[str, Any] = {}
    keep_alive: Any = None
    think: bool | str | None = None
    truncate: bool = True
    shift: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: dict[str, float] = {}  # ours here: OpenAI's, token id -> -100..100 added to its logit
    grammar: str = ""  # ours, as in llama.cpp: GBNF, or llguidance's Lark, that the answer is held to
    service_tier: str = ""  # ours, with OpenAI's words: flex goes behind other requests, priority before one's own
    cache_salt: str = ""  # ours: prefixes are shared among requests with equal ones only
    debug_render_only: bool = msgspec.field(name="_debug_render_only", default=False)

    def __post_init__(self) -> None:
        if isinstance(self.think, str) and self.think not in THINK_LEVELS:
            levels = ", ".join(f'"{level}"' for level in THINK_LEVELS)
            raise BadRequest(f'invalid think value: "{self.think}" (must be {levels}, true, or false)')
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise BadRequest(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
        check_bias(self.logit_bias)
        if len(self.cache_salt) > 256:
            raise BadRequest("cache_salt must not have more than 256 characters")
        lifetime(self.keep_alive)


class GenerateRequest(Inference, kw_only=True, omit_defaults=True):
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: list[int] = []
    raw: bool = False
    images: list[str] = []


class ChatRequest(Inference, kw_only=True, omit_defaults=True):
    messages: list[Message] = []
    tools: list[Tool] = []
    tool_choice: Any = None  # ours here, in OpenAI's words, and parallel_tool_calls
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for message in self.messages:
            message.role = message.role.lower()
            message.content = message.content or ""


class EmbedRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str = ""
    input: Any = None
    truncate: bool = True
    dimensions: int = 0
    options: dict[str, Any] = {}
    keep_alive: Any = None
    service_tier: str = ""

    def __post_init__(self) -> None:
        lifetime(self.keep_alive)


class EmbeddingsRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str = ""
    prompt: str = ""
    options: dict[str, Any] = {}
    keep_alive: Any = None

    def __post_init__(self) -> None:
        lifetime(self.keep_alive)


class ModelRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Names a model in `model`, or in `name` as older clients do: /api/show, /api/delete, /api/pull, /api/push."""

    model: str = ""
    name: str = ""
    stream: bool = True
    verbose: bool = False
    system: str = ""
    options: dict[str, Any] = {}

    @property
    def target(self) -> str:
        return self.model or self.name


class CopyRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    source: str = ""
    destination: str = ""


class CreateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`from` is written `base` here. `license` is a string or a list of strings; `files` maps relative paths to digests."""

    model: str = ""
    name: str = ""
    stream: bool = True
    base: str = msgspec.field(name="from", default="")
    files: dict[str, str] = {}
    adapters: dict[str, str] = {}
    draft_files: dict[str, str] = {}
    draft_quantize: str = ""
    quantize: str = ""
    quantization: str = ""
    template: str = ""
    system: str = ""
    license: Any = None
    parameters: dict[str, Any] = {}
    messages: list[Message] = []
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    info: dict[str, Any] = {}
    modelfile: str = ""

    @property
    def target(self) -> str:
        return self.model or self.name


class TokenLogprob(msgspec.Struct, kw_only=True):
    """`bytes` are those of the token, which may be part of a character."""

    token: str
    logprob: float | None  # None: the first token of a prompt
    bytes: list[int]


class Logprob(TokenLogprob, kw_only=True, omit_defaults=True):
    top_logprobs: list[TokenLogprob] = []


class DebugInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    rendered_template: str
    image_count: int = 0


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of an answer. The counts and durations stand in the last, which has `done`.

    Ours besides Ollama's: `draft_count` tokens were guessed ahead, of which `draft_accepted_count` came true; `truncated`
    says that the prompt was cut to fit the context, `prompt_tokens_total` how many tokens it had before;
    `prompt_eval_cached_count`, of prompt_eval_count, those found in the prefix cache; `warning` what came too late for
    the header X-Ollamapy-Warning; `error` is the whole content of a last line that reports a failure.
    """

    model: str
    created_at: str
    done: bool
    done_reason: str = ""
    logprobs: list[Logprob] = []
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_cached_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    draft_count: int = 0
    draft_accepted_count: int = 0
    truncated: bool = False
    prompt_tokens_total: int = 0
    context_shifts: int = 0
    warning: str = ""
    debug_info: DebugInfo | None = msgspec.field(name="_debug_info", default=None)


class GenerateResponse(Reply, kw_only=True, omit_defaults=True):
    response: str
    thinking: str = ""
    tool_calls: list[ToolCall] = []
    context: list[int] = []
    prompt_logprobs: list[Logprob] = []  # of /v1/completions with echo: all of the prompt's tokens


class ChatResponse(Reply, kw_only=True, omit_defaults=True):
    message: AnswerMessage


class EmbedResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    truncated: bool = False
    prompt_tokens_total: int = 0


class EmbeddingsResponse(msgspec.Struct):
    embedding: list[float]


class Details(msgspec.Struct, kw_only=True, omit_defaults=True):
    parent_model: str
    format: str
    family: str
    families: list[str] | None
    parameter_size: str
    quantization_level: str
    context_length: int = 0
    embedding_length: int = 0


class ListedModel(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    model: str
    remote_model: str = ""
    remote_host: str = ""
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str] = []


class ListResponse(msgspec.Struct):
    models: list[ListedModel]


class RunningModel(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`size` and `size_vram` are measured bytes. `engine` (ours, on request) has the engine's figures."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int
    notes: list[str] = []
    engine: dict[str, Any] = {}


class RunningResponse(msgspec.Struct, omit_defaults=True):
    models: list[RunningModel]
    daemon: dict[str, int] = {}  # ours, on request: the tasks of its event loop


class TensorEntry(msgspec.Struct):
    name: str
    type: str
    shape: list[int]


class ShowResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    license: str = ""
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    details: Details
    messages: list[Message] = []
    remote_model: str = ""
    remote_host: str = ""
    model_info: dict[str, Any]
    projector_info: dict[str, Any] = {}
    tensors: list[TensorEntry] = []
    capabilities: list[str] = []
    modified_at: str
    requires: str = ""


class Progress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of create, pull or push."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0
