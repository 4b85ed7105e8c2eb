"""What the daemon and an engine process say to each other, and the plain values both use. No torch.

Frames are a 4-byte little-endian length and a msgpack body (msgspec tagged structs), over one inherited
socketpair per engine. The daemon sends `Command`s; the engine sends `Event`s, one `Step` per engine step for
all sequences together. Durations are integer nanoseconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

KVType = Literal["f16", "bf16", "f32", "q8_0", "fp8"]
FinishReason = Literal["stop", "length", "abort", "error"]
ServiceTier = Literal["priority", "default", "flex"]
SpeculationMode = Literal["off", "ngram", "draft", "auto"]
MAX_ADAPTERS = 16  # that an engine keeps loaded; one in use stays beyond that
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # most of a step; bounds of vLLM's histogram
MAX_FRAME = 256 << 20  # bytes; a 1M-token prompt in msgpack is under 6 MB


class Trigger(msgspec.Struct, frozen=True):
    """When a grammar that sleeps is to begin: after a token, or where `text` is not empty after that, outside of thinking."""

    token_id: int = -1
    text: str = ""
    thinking: tuple[str, str] = ("", "")  # its tags, where the model thinks; it begins with the answer or not at all
    in_thinking: bool = False  # the prompt has opened it


class SamplingParams(msgspec.Struct, frozen=True):
    """How one request is sampled and when it ends. Names and meanings are those of Ollama's options.

    The order of the steps is llama.cpp's: logit bias, penalties, DRY, grammar, top_k, typical_p, top_p, min_p, XTC,
    temperature, draw. Under mirostat: logit bias, penalties, DRY, grammar, temperature, mirostat, draw.
    """

    temperature: float = 0.8  # <= 0: greedy
    top_k: int = 40  # <= 0: off
    top_p: float = 0.9  # >= 1: off
    min_p: float = 0.0
    typical_p: float = 1.0  # >= 1: off
    repeat_last_n: int = 64  # 0: off, -1: the whole context
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0  # 1, 2: that version of it, and none of the filters above; anything else: off
    mirostat_tau: float = 5.0  # bits of surprise aimed at
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens that may be repeated
    dry_penalty_last_n: int = -1  # 0: off, -1: the whole context
    dry_breakers: tuple[int, ...] = ()  # tokens that no repetition goes past
    dry_breaker_sequences: tuple[tuple[int, ...], ...] = ()
    xtc_probability: float = 0.0  # <= 0: off
    xtc_threshold: float = 0.1  # > 0.5: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids
    seed: int = -1  # < 0: a random one is drawn when the request is made
    max_tokens: int = -1  # generated tokens, a stop id included; < 0: ten context lengths
    stop_ids: tuple[int, ...] = ()  # end of generation; the id itself is not reported
    suppress_ids: tuple[int, ...] = ()  # never sampled (padding and unused ids)
    context_length: int = 0  # this request's num_ctx, at most Plan.max_context; 0: the engine's
    num_keep: int = 4  # head tokens kept at a context shift; -1: the whole prompt
    shift: bool = True  # False: finish with "length" when the context is full
    logprobs: int = -1  # -1: none; n >= 0: of the token chosen and of the n likeliest
    prompt_logprobs: int = -1  # the same of the prompt's tokens but the first, which then reuses no prefix
    grammar: str = ""  # what may be generated, in llguidance's JSON form; "": anything
    trigger: Trigger | None = None  # the grammar sleeps until this comes, and again after each end of it
    adapters: tuple[tuple[str, float], ...] = ()  # LoRA files (GGUF) beside the model's weights, and their scales
    speculation: SpeculationMode = "off"  # where guesses of tokens ahead come from; "auto": whatever pays
    num_draft: int = 0  # most tokens guessed ahead; 0: as many as pay
    later: bool = False  # another answer of a request: that it uses the same prefix is no second use
    cache_salt: str = ""  # cached prefixes are shared among requests with equal salts only


class LayerGroup(msgspec.Struct, frozen=True):
    """Layers that share block tables. A window other than 0: the blocks behind it are given back."""

    window: int
    layers: tuple[int, ...]


class LayerSpan(msgspec.Struct, frozen=True):
    """Consecutive layers on one device."""

    device: str  # torch device string
    num_layers: int


class Plan(msgspec.Struct, frozen=True):
    """What placement decided about one engine: everything its process needs to load and run the model."""

    model_path: str  # GGUF; of a split model, its first file
    draft_path: str = ""  # GGUF of a smaller model of the same vocabulary that guesses ahead
    num_draft_blocks: int = 0  # KV blocks of the draft model's own pool
    device: str = "cpu"  # torch device string; of the embedding, the head and sampling
    spans: tuple[LayerSpan, ...] = ()  # where the layers are, in order; (): all on `device`
    kv_dtype: KVType = "f16"
    block_size: int = 16  # tokens per KV block
    num_blocks: int = 256  # KV blocks in the pool, shared by all sequences
    context_length: int = 4096  # most tokens of a sequence that does not say how many it wants
    max_context: int = 0  # most tokens that one may want: what the pool holds; 0: context_length
    max_num_seqs: int = 64  # sequences that run together
    max_batch_tokens: int = 512  # token budget of one step
    num_threads: int = 0  # 0: physical cores
    kernels: str = ""  # force a kernel family: reference | csrc | triton; "": by capability
    precise: bool = False  # activations keep the precision of float32
    prefix_cache: bool = True
    prefix_folder: str = ""  # where prefixes are kept in files; "": nowhere
    prefix_bytes: int = 0  # most bytes of them, all models together
    groups: tuple[LayerGroup, ...] = ()  # (): all layers in one group that keeps every token
    slowdown: float = 2.5  # how much longer than decoding alone a step with prompt tokens may take; <= 1: no limit
    least_blocks: int = 0  # on a GPU: num_blocks becomes what there is room for once the weights are there, between these
    most_blocks: int = 0  # 0: it stays as it is
    reserve_bytes: int = 0  # of a GPU that are left free
    cuda_graphs: bool = True  # on a GPU: steps that only decode are recorded
    overlap: bool = True  # on a GPU: such a step starts before the tokens of the one before have come to the host


class Caller(msgspec.Struct, frozen=True):
    """Whose request it is, for the fair share between clients, and how urgent. `client` is any text, "" also."""

    client: str = ""
    tier: ServiceTier = "default"
    salt: str = ""  # of its key: callers share cached prefixes only where these are equal


NOBODY = Caller()


# --- daemon -> engine ---------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    request_id: int
    token_ids: list[int]
    params: SamplingParams
    caller: Caller = NOBODY


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    request_id: int
    token_ids: list[int]
    caller: Caller = NOBODY


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: int


class GetStats(msgspec.Struct, frozen=True, tag="get_stats"):
    pass


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


Command = Generate | Embed | Abort | GetStats | Shutdown

# --- engine -> daemon ---------------------------------------------------------------------------------------


class EngineInfo(msgspec.Struct, frozen=True):
    """What was loaded; sizes are measured bytes."""

    architecture: str
    device: str
    context_length: int
    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_bytes: int
    vram_bytes: int  # of weights and KV, the part on a GPU
    embedding_length: int
    max_context: int = 0  # what a request may set its context to
    kv_dtype: KVType = "f16"
    precise: bool = False
    kernels: dict[str, str] = {}  # op -> implementation chosen
    cpu_isa: str = ""  # the instruction set of those in C++ for the CPU
    load_ns: int = 0
    notes: tuple[str, ...] = ()  # what turned out otherwise than planned


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Load progress; `completed` and `total` are bytes of weights."""

    status: str
    completed: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # likeliest first, at most SamplingParams.logprobs of them


class Finish(msgspec.Struct, frozen=True):
    """Why a request ended and what it cost. `prompt_tokens` counts cached ones too, `completion_tokens` the stop id."""

    reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_ns: int = 0  # from its first scheduled step to its first token
    decode_ns: int = 0  # from its first token to its last
    queue_ns: int = 0  # from arrival to its first scheduled step
    num_shifts: int = 0  # context shifts
    drafted_tokens: int = 0  # guessed ahead and verified, and how many of them came true
    accepted_tokens: int = 0
    error: str = ""
    bad_request: bool = False  # the error is the request's own: a grammar that grows too large


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step did for one request; the last one carries `finish`."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob] = []  # of the prompt's next tokens, from its second on
    queue_ns: int = 0  # of its first one: from arrival to its first scheduled step
    cached_tokens: int = 0  # of its prompt, on the first one
    drafts: tuple[int, int] = (0, 0)  # tokens guessed for it up to now, and those that came true; on steps that verified some
    num_shifts: int = 0  # context shifts up to now


class Step(msgspec.Struct, frozen=True, tag="step"):
    outputs: list[Output]


class Embedding(msgspec.Struct, frozen=True, tag="embedding"):
    """`vector` is little-endian float32, pooled, not normalised. A non-empty `error` means it failed."""

    request_id: int
    vector: bytes
    num_tokens: int
    error: str = ""
    queue_ns: int = 0  # from arrival to its first scheduled step


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    num_running: int
    num_waiting: int
    free_blocks: int
    cached_blocks: int  # unreferenced, kept for prefix reuse
    used_blocks: int
    total_blocks: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    num_preemptions: int
    num_steps: int
    num_evictions: int = 0  # cached blocks whose content was given up for others
    disk_bytes: int = 0  # of prefixes kept in files, all models together
    disk_written_blocks: int = 0
    disk_read_tokens: int = 0  # prompt tokens whose blocks came from files
    disk_bad_files: int = 0  # damaged ones, deleted
    disk_failed_writes: int = 0
    num_drafts: int = 0  # guesses of speculation, their tokens, and those that came true
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    step_tokens: tuple[int, ...] = ()  # steps by their tokens, as STEP_TOKENS has it; the last: those of more
    num_step_tokens: int = 0  # of all steps: of prompts, and generated
    num_ahead: int = 0  # steps started before the results of the one before were read; tokens of them that came too late
    num_discarded: int = 0
    graphs: dict[str, int | str] = {}  # on a GPU, see `Graphs.facts`
    integrity: str = "ok"  # or what check_integrity() found


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot load or go on; its process ends after this. `status` is the HTTP status to answer."""

    error: str
    status: int = 500


Event = Loading | Ready | Step | Embedding | Stats | Fatal
