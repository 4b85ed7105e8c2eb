"""Every environment variable that ollamapy reads: name, type, default, meaning. Nothing else reads the environment.

Values are trimmed of blanks and quotes, as Ollama does. A bad value is reported by name and the default is used;
a boolean that cannot be parsed counts as true (Ollama's rule).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FOREVER = float("inf")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of a Go duration ("1h30m", "250ms") ; negative means forever. Raises ValueError."""
    match = re.fullmatch(r"([+-]?)((?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+", text)
    if text in ("0", "+0", "-0"):
        return 0.0
    if match is None:
        raise ValueError(f'time: invalid duration "{text}"')
    if text.startswith("-"):
        return FOREVER
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", text)
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)


def _seconds(text: str) -> float:
    """A Go duration or a number of seconds; negative means forever."""
    try:
        number = float(text)
    except ValueError:
        return parse_duration(text)
    return FOREVER if number < 0 else number


def _boolean(text: str) -> bool:
    return text.lower() not in ("0", "f", "false")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _speculation(text: str) -> str:
    if text not in ("auto", "ngram", "draft", "off"):
        raise ValueError("must be auto, ngram, draft or off")
    return text


def _variable(name: str, parse: Callable[[str], Any], default: Any, help: str, *, secret: bool = False) -> Any:
    return field(default=default, metadata={"name": name, "parse": parse, "help": help, "secret": secret})


@dataclass(frozen=True, slots=True)
class Settings:
    """The process's settings. Frozen: made once by `load` and passed on."""

    host: str = _variable("OLLAMA_HOST", str, "127.0.0.1:11434", "Address the server listens on and the client calls")
    models: Path = _variable("OLLAMA_MODELS", Path, Path(), "Folder of the model store (default ~/.ollama/models)")  # noqa: RUF009
    origins: tuple[str, ...] = _variable("OLLAMA_ORIGINS", _names, (), "More allowed origins, comma separated")
    keep_alive: float = _variable("OLLAMA_KEEP_ALIVE", _seconds, 300.0, 'How long models stay loaded (default "5m")')
    load_timeout: float = _variable("OLLAMA_LOAD_TIMEOUT", _seconds, 300.0, 'Give up on a load that stalls (default "5m")')
    max_loaded_models: int = _variable("OLLAMA_MAX_LOADED_MODELS", _count, 0, "Models loaded at once (0: 3 per GPU, or 3)")
    num_parallel: int = _variable("OLLAMA_NUM_PARALLEL", _count, 0, "Full contexts a model has KV room for (0: by memory)")
    max_queue: int = _variable("OLLAMA_MAX_QUEUE", _count, 512, "Requests that may wait, per model")
    max_queue_per_client: int = _variable(
        "OLLAMAPY_MAX_QUEUE_PER_CLIENT", _count, 0, "Requests of one client that may wait, per model (0: half of the queue)"
    )
    api_keys: str = _variable(
        "OLLAMAPY_API_KEYS",
        str,
        "",
        "Keys, one of which requests must carry: a comma list, or a file's path",
        secret=True,
    )
    api_key: str = _variable("OLLAMA_API_KEY", str, "", "Key that the command line sends", secret=True)
    context_length: int = _variable("OLLAMA_CONTEXT_LENGTH", _count, 0, "Default context length (0: by memory)")
    kv_cache_type: str = _variable(
        "OLLAMA_KV_CACHE_TYPE", str, "", "Type of the KV cache: f16, q8_0, bf16, f32 or, on newer GPUs, fp8 (default f16)"
    )
    flash_attention: str = _variable("OLLAMA_FLASH_ATTENTION", str, "", "Accepted; paged attention is always used")
    prefix_cache_bytes: int = _variable(
        "OLLAMAPY_PREFIX_CACHE_BYTES", _count, 2 << 30, "Disk for prompt prefixes that outlive a model's unloading (0: none)"
    )
    gpu_overhead: int = _variable("OLLAMA_GPU_OVERHEAD", _count, 0, "Bytes to leave free on each GPU")
    sched_spread: bool = _variable("OLLAMA_SCHED_SPREAD", _boolean, False, "Spread a model over all GPUs")
    go_template: bool | None = _variable("OLLAMA_GO_TEMPLATE", _boolean, None, "Use the Modelfile's TEMPLATE when there is one")
    noprune: bool = _variable("OLLAMA_NOPRUNE", _boolean, False, "Do not prune unused blobs at start")
    nohistory: bool = _variable("OLLAMA_NOHISTORY", _boolean, False, "Keep no history of prompts")
    debug: str = _variable("OLLAMA_DEBUG", str, "", "1: debug log, 2: trace")
    editor: str = _variable("OLLAMA_EDITOR", str, "", "Editor for long prompts (Ctrl+G)")
    speculation: str = _variable(
        "OLLAMAPY_SPECULATION", _speculation, "auto", "Guesses of tokens ahead: auto, ngram, draft or off (default auto)"
    )
    device: str = _variable("OLLAMAPY_DEVICE", str, "", "Force a device: cpu, cuda, cuda:1 (default: the best there is)")
    cuda_visible_devices: str | None = _variable("CUDA_VISIBLE_DEVICES", str, None, "GPUs to use, by number or UUID (-1: none)")
    hip_visible_devices: str | None = _variable("HIP_VISIBLE_DEVICES", str, None, "AMD GPUs to use, by number or UUID")
    rocr_visible_devices: str | None = _variable("ROCR_VISIBLE_DEVICES", str, None, "AMD GPUs that HIP gets to number")
    kernels: str = _variable("OLLAMAPY_KERNELS", str, "", "Force a kernel family: reference, csrc or triton")
    batch_invariant: bool = _variable(
        "OLLAMAPY_BATCH_INVARIANT", _boolean, False, "Triton: bits of an answer never depend on its batch"
    )
    precise: bool = _variable("OLLAMAPY_PRECISE", _boolean, False, "Keep activations and the KV cache in float32")
    cuda_graphs: bool = _variable("OLLAMAPY_CUDA_GRAPHS", _boolean, True, "Record decoding steps on a GPU as CUDA graphs")
    overlap: bool = _variable("OLLAMAPY_OVERLAP", _boolean, True, "On a GPU, start steps before the last one's tokens are read")
    metrics: str = _variable(
        "OLLAMAPY_METRICS", str, "", "Address for Prometheus' /metrics, such as 127.0.0.1:9464 (default: none)"
    )
    otlp_endpoint: str = _variable(
        "OTEL_EXPORTER_OTLP_ENDPOINT", str, "", "Collector that spans of requests go to, such as http://127.0.0.1:4318"
    )
    cpu_isa: str = _variable("OLLAMAPY_CPU_ISA", str, "", "Force an instruction set: base, avx2, avx512vnni, avx512bf16")
    no_extension: bool = _variable("OLLAMAPY_NO_EXTENSION", _boolean, False, "Do not load or build the C++ extension")
    cxx: str = _variable("CXX", str, "", "")
    cuda_home: str = _variable("CUDA_HOME", str, "", "")
    cache_home: Path = _variable("XDG_CACHE_HOME", Path, Path(), "")  # noqa: RUF009
    home: Path = _variable("HOME", Path, Path(), "")  # noqa: RUF009

    @property
    def cache_folder(self) -> Path:
        """Where files lie that can be made again."""
        return (self.cache_home if self.cache_home.parts else self.home / ".cache") / "ollamapy"

    def describe(self) -> dict[str, str]:
        """Variable name -> value in force, for the start-up log; of secrets only whether there is one."""
        shown = {f.metadata["name"]: str(getattr(self, f.name)) for f in fields(self) if f.metadata["help"]}
        return shown | {f.metadata["name"]: "set" for f in fields(self) if f.metadata["secret"] and getattr(self, f.name)}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment (or from `environ` in tests). Bad values are logged and ignored."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for f in fields(Settings):
        text = environ.get(f.metadata["name"], "").strip().strip("\"'")
        empty_counts = f.name.endswith("_visible_devices") and f.metadata["name"] in environ  # empty means none
        if not text and not empty_counts:
            continue
        try:
            values[f.name] = f.metadata["parse"](text)
        except ValueError as error:
            log.warning("ignoring %s=%r: %s", f.metadata["name"], text, error)
    home = values.setdefault("home", Path.home())
    models = values.get("models", home / ".ollama" / "models")
    values["models"] = home / models.relative_to("~") if models.parts[:1] == ("~",) else models
    return Settings(**values)


def child_environment(**overrides: str) -> dict[str, str]:
    """The environment of a process that the daemon starts: its own, with `overrides`."""
    return {**os.environ, **overrides}


def help_text(names: tuple[str, ...] | None = None) -> str:
    """The "Environment Variables" block of `--help`, for all documented variables or for `names`."""
    rows = [(f.metadata["name"], f.metadata["help"]) for f in fields(Settings) if f.metadata["help"]]
    shown = [row for row in rows if names is None or row[0] in names]
    width = max(len(name) for name, _ in shown)
    return "Environment Variables:\n" + "\n".join(f"      {name:<{width}}   {text}" for name, text in shown)
