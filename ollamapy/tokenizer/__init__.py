"""Text to token ids and back, built from GGUF metadata."""

from ollamapy.tokenizer.stream import StreamDecoder
from ollamapy.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
