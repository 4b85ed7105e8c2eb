"""The exception tree. Each class carries the HTTP status that its message is answered with.

    OllamapyError                500
    ├── BadRequest               400   the request is wrong; the text says how
    │   ├── GGUFError            400   a model file is malformed: names file, field, offset
    │   ├── ModelfileError       400   a Modelfile line is wrong: names the line
    │   ├── TemplateError        400   a chat template does not parse, or runs past its limits
    │   ├── TokenizerError       400   tokenizer metadata is missing, malformed or of an unknown kind
    │   ├── UnsupportedModel     400   architecture, tensors or types that this build cannot run
    │   ├── OptionError          400   an option or PARAMETER of the wrong type or range
    │   └── ContextOverflow      400   prompt longer than the context, with both counts
    ├── Unauthorized             401   no API key, or a wrong one, where the server has keys
    ├── Forbidden                403   a client's own: the server refuses its Host or Origin
    ├── NotFound                 404   model, blob or route
    ├── TooSlow                  408   the request's body came slower than a client that is still there would send it
    ├── TooLarge                 413   the request's body is over the limit
    ├── ClientGone               499   the client left while it was queued
    ├── NotSupported             501   a feature of Ollama that is named but not built yet
    ├── Unreachable              502   a client's own: no server answers, or it went away in the middle
    ├── ServerBusy               503   queue full; carries Retry-After
    ├── StoreError               500   the model store cannot be read or written
    └── EngineError              500   an engine process failed to load, died or reported a failure

`assert` is for our own bugs; anything a user, a file or a peer can cause raises one of these.
No caller tells errors apart by their text.
"""

from __future__ import annotations

import errno


class OllamapyError(Exception):
    """Base of every error that may reach a user; `str(error)` is the text shown."""

    status: int = 500


class BadRequest(OllamapyError):
    status = 400


class GGUFError(BadRequest):
    """A malformed GGUF file. `field` is a metadata key, tensor or header part; `offset` is in bytes."""

    def __init__(self, path: object, field: str, offset: int, problem: str) -> None:
        super().__init__(f"{path}: {field} at offset {offset}: {problem}")
        self.path, self.field, self.offset, self.problem = str(path), field, offset, problem


class ModelfileError(BadRequest):
    """A Modelfile that does not parse. `line` counts from 1, None when no single line is at fault."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"(line {line}): {problem}")
        self.line = line


class TemplateError(BadRequest):
    pass


class TokenizerError(BadRequest):
    pass


class UnsupportedModel(BadRequest):
    pass


class OptionError(BadRequest):
    pass


class ContextOverflow(BadRequest):
    def __init__(self, num_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, which exceeds the available context of {context_length} tokens; "
            "use a shorter prompt or a larger num_ctx"
        )
        self.num_tokens, self.context_length = num_tokens, context_length


class Unauthorized(OllamapyError):
    status = 401


class Forbidden(OllamapyError):
    status = 403


class NotFound(OllamapyError):
    status = 404


class TooSlow(OllamapyError):
    status = 408


class TooLarge(OllamapyError):
    status = 413


class ClientGone(OllamapyError):
    status = 499


class NotSupported(OllamapyError):
    status = 501


class Unreachable(OllamapyError):
    status = 502


class ServerBusy(OllamapyError):
    """The request was refused before any work; retry after `retry_after` seconds. `limit`: whose it is, "model" or "client"."""

    status = 503

    def __init__(self, text: str, retry_after: int = 1, limit: str = "") -> None:
        super().__init__(text)
        self.retry_after, self.limit = retry_after, limit


class StoreError(OllamapyError):
    pass


class EngineError(OllamapyError):
    pass


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, the system's, torch's for a device and for a CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)  # it has no class
    return allocator or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def failure_text(error: BaseException) -> str:
    """For users: without the message, which may tell paths and addresses."""
    what = "ran out of memory" if lacks_memory(error) else "failed"
    return f"the model {what} on this request ({type(error).__name__}); the log has the details"
