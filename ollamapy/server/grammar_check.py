"""The child process that tries grammars: one line of JSON in, one out. What it cannot bear ends it and not the daemon."""

from __future__ import annotations

import json
import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_MEMORY = 2 << 30  # bytes of address space; the libraries take a quarter of it
MAX_ERROR = 600  # characters
END = 256
PROBE = 48  # bytes of an answer that are tried


class ByteTokens:
    """A vocabulary of the 256 bytes and an end: enough to see whether a grammar has a beginning."""

    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = END, None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    special_token_ids = [END]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def problem(grammar: str, tokenizer: LLTokenizer) -> str:
    """Why no answer can be held to the grammar; "" when one can."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        for _ in range(PROBE):  # this is where a lexer or parser that grows too large, or a grammar without a sentence, shows
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            if matcher.is_error() or mask >> END & 1:
                break
            if not mask:
                return "no text fits it"
            matcher.consume_token((mask & -mask).bit_length() - 1)
        if not matcher.is_error():
            return ""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        return "no text fits it"
    half = MAX_ERROR // 2
    return text if len(text) <= MAX_ERROR else f"{text[:half]} ... {text[-half:].strip()}"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    tokenizer = LLTokenizer(ByteTokens(), slices=[])  # type: ignore[arg-type]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(problem(line, tokenizer)), flush=True)
