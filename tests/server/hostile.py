"""Requests as an enemy sends them: extreme and wrong values of every option and field, many at once. Seeded."""

from __future__ import annotations

import random
from typing import Any

Request = tuple[str, dict[str, Any]]  # path and body

EXTREMES: list[Any] = [-1, 0, 1, 2**31, 2**63, -(2**63), 1e308, -1e308, 1.5, "1", "", [], {}, None, True, "\x00", "\ud800"]
ODD_TEXTS = [
    "\ud800\udc00 \udfff",
    "\x00\x01\x7f",
    "<|im_end|>" * 50,
    "{{",
    "{% for x in range(10**9) %}",
    "\u202e" * 9,
    "😀" * 40,
]
OPTIONS = "num_ctx num_batch num_gpu num_thread num_keep seed num_predict top_k top_p min_p typical_p repeat_last_n"
OPTIONS += " temperature repeat_penalty presence_penalty frequency_penalty stop main_gpu use_mmap draft_num_predict"
OPTIONS += " mirostat mirostat_tau mirostat_eta dry_multiplier dry_base dry_allowed_length dry_penalty_last_n"
OPTIONS += " dry_sequence_breakers xtc_probability xtc_threshold grammar speculation precise"
RELOADING = ("num_ctx", "num_batch", "num_thread", "num_gpu", "main_gpu", "use_mmap", "precise")  # a good value loads again
FIELDS = "prompt suffix system template context raw stream format options keep_alive think truncate shift logprobs top_logprobs"
FIELDS += " grammar logit_bias cache_salt service_tier n"

# Besides EXTREMES, for those with more to get wrong. Of the options that load the model again, only what must not.
_VALUES: dict[str, list[Any]] = {
    "num_batch": [-1, 0, 65537, 10**6, 2**31 - 1, 2**31, 1e308, "512", [], {}, None],
    "num_thread": [-1, 0, 257, 10**6, 2**31 - 1, 2**31, 1e308, "2", [], {}, None],
    "mirostat": [1, 2, 3, -5],
    "mirostat_tau": [-3.0, 0.0, 1e30, 3e38],
    "mirostat_eta": [-1.0, 0.0, 1e30, 3e38],
    "dry_multiplier": [0.8, -5.0, 1e30, 3e38],
    "dry_base": [0.0, 1.0, 1.000001, 1.0000011, 2.0, 1e30],
    "dry_allowed_length": [-(2**31), 0, 1, 2**31 - 1],
    "dry_penalty_last_n": [-1, 1, 2, 2**31 - 1],
    "dry_sequence_breakers": [
        ["e"] * 64,
        ["e"] * 65,
        ["a" * 1025],
        ["", "\n"],
        ["\ud800"],
        ["😀"],
        [5],
        ["many words of text"],
    ],
    "stop": [["e"] * 16, ["e"] * 17, ["a" * 1025], ["", "\n"], ["<|im_end|>"], [5], ["\ud800"]],
    "xtc_probability": [0.5, 1.0, 1e30],
    "xtc_threshold": [0.0, 0.1, 0.5, 0.9, -1.0],
    "grammar": [
        'root ::= "yes" | "no"',
        "root ::= root",
        "start: /[a-z]+/",
        'start: s\ns: s s | "a"',
        "root ::= (",
        "x" * 70000,
    ],
    "speculation": ["auto", "ngram", "draft", "off", "both", 5],
    "draft_num_predict": [0, 1, 8, 1000, 2**31 - 1],
    "temperature": [0.0, 1e-30, 1e30, 3e38],
    "format": [
        "json",
        {"type": "string"},
        {"$ref": "#"},
        {"regex": "(" * 99},
        {"choices": ["a", 5]},
        {"lark": "start: missing"},
    ],
    "logit_bias": [{"5": 100.0}, {"5": -100.0}, {"-1": 1.0}, {"49152": 1.0}, {"x": 1.0}, {"5": 1e308}, {"5": "x"}],
    "cache_salt": ["a", "é" * 5000, "\x00"],
    "service_tier": ["flex", "priority", "gold"],
    "n": [2, 3, 0, -1, 129, 10**9],
    "keep_alive": ["5m", "x", [], {}],  # short ones would unload the model
    "num_predict": [0, 1, 2],
    "logprobs": [True, 5, 20, 21],
    "top_logprobs": [0, 5, 20, 21, -1],
    "template": ["{{ .Prompt }}", "{{ range .Messages }}" * 70, "{{ .Prompt }}" * 6000, "{% raw %}"],
    "options": [{"unknown": 1}, {"temperature": []}],
}
_ONLY = ("num_batch", "num_thread", "num_predict", "keep_alive")


def requests(seed: int, model: str, count: int) -> list[Request]:
    """No request of them may load the model again, unload it, or take long."""
    rng = random.Random(seed)
    return [_request(rng, model) for _ in range(count)]


def _request(rng: random.Random, model: str) -> Request:
    names = [name for name in OPTIONS.split() if name not in RELOADING or name in _VALUES]
    options = {name: value(rng, name) for name in rng.sample(names, rng.choice([1, 1, 2, 3, 6]))}
    options.setdefault("num_predict", rng.choice([1, 2, 3]))
    options["num_thread" if rng.random() < 0.05 else "seed"] = rng.choice([257, 10**6])
    fields = rng.sample([name for name in FIELDS.split() if name != "options"], rng.choice([0, 0, 1, 2, 3]))
    more = {name: value(rng, name) for name in fields}
    text = rng.choice([*ODD_TEXTS, "Hi there", "Hi there", "one two three " * 20])
    turns = [{"role": rng.choice(["user", "system", "tool", text]), "content": text}]
    bodies: dict[str, dict[str, Any]] = {
        "/api/generate": {"prompt": text, **more},
        "/api/chat": {"messages": turns, **more},
        "/v1/chat/completions": {"messages": turns, "max_tokens": 2, **more},
        "/v1/completions": {"prompt": rng.choice([text, [text, "x"], [1, 2, 3], [-1], [2**31]]), "max_tokens": 2, **more},
        "/api/embed": {"input": rng.choice([text, [text] * 5, "", 5, [5]]), **more},
    }
    path = rng.choice([*bodies, "/api/generate"])
    return path, {"model": model, "options": options, "stream": rng.random() < 0.3, **bodies[path]}


def value(rng: random.Random, name: str) -> Any:
    """Mostly of the right type: what is refused at once tries nothing."""
    own = _VALUES.get(name, [] if name in FIELDS.split() else [-1, 0, 1, 1.5, 0.01, 100])
    return rng.choice(own if name in _ONLY or (own and rng.random() < 0.9) else EXTREMES)
