"""RunnerOptions: the options of a request that shape an engine, and not only an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ollamapy.api.options import Options
from ollamapy.cores import MAX_THREADS
from ollamapy.errors import OptionError

MIN_CONTEXT = 4
MAX_BATCH = 1 << 16  # tokens of a step; above a few thousand nothing gets faster


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """The options that shape an engine; None where the user leaves the choice."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    precise: bool | None = None

    @classmethod
    def of(cls, options: Options | Mapping[str, object]) -> RunnerOptions:
        """Of merged `Options`, where a default stands for no choice, or of a mapping with only what was given.

        Raises OptionError for what no engine can be started with.
        """
        if isinstance(options, Options):
            options = {name: getattr(options, name) for name in cls.__dataclass_fields__}
            options["num_ctx"] = options["num_ctx"] or None  # merge() has made an explicit 0 a 4
            options["num_batch"] = None if options["num_batch"] == Options().num_batch else options["num_batch"]
        num_ctx, num_batch = _integer(options, "num_ctx"), _integer(options, "num_batch", MAX_BATCH)
        num_gpu, num_thread = _integer(options, "num_gpu"), _integer(options, "num_thread", MAX_THREADS)
        return cls(
            num_ctx=None if num_ctx is None else max(MIN_CONTEXT, num_ctx),
            num_batch=num_batch if num_batch is not None and num_batch > 0 else None,
            num_gpu=num_gpu if num_gpu is not None and num_gpu >= 0 else None,
            main_gpu=_integer(options, "main_gpu"),
            num_thread=num_thread if num_thread is not None and num_thread > 0 else None,
            precise=None if options.get("precise") is None else bool(options["precise"]),
        )


def _integer(options: Mapping[str, object], name: str, most: int | None = None) -> int | None:
    value = options.get(name)
    if not isinstance(value, int | float):
        return None
    if most is not None and value > most:
        raise OptionError(f'option "{name}" is {int(value)}: at most {most}')
    return int(value)
