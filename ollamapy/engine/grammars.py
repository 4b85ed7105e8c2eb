"""Grammars: compiles them for one model, beside the engine's steps. llguidance is imported when the first one comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ollamapy.engine.grammar import Grammar, Vocabulary
from ollamapy.engine.protocol import Trigger
from ollamapy.engine.trigger import Spelling, Triggered
from ollamapy.errors import BadRequest, EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 64  # compiled grammars; the largest that are let in take a few MB each


class Grammars:
    """Compiles grammars for one model, in a thread: the first one takes a second more at 262,144 tokens."""

    def __init__(self, read_vocabulary: Callable[[], Vocabulary] | None) -> None:
        self._read_vocabulary = read_vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._spelling: Spelling | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def start(self, text: str, trigger: Trigger | None = None) -> Future[Grammar]:
        """The beginning of the grammar `text` (llguidance's JSON form), which sleeps until `trigger`; the future raises
        BadRequest where it does not compile, EngineError where the model has no use for any."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammar")
        return self._thread.submit(self._start, text, trigger)

    def _start(self, text: str, trigger: Trigger | None) -> Grammar:
        matcher = self._compiled.pop(text, None) or self._compile(text)
        self._compiled[text] = matcher
        if len(self._compiled) > MAX_KEPT:
            self._compiled.popitem(last=False)
        assert self._tokenizer is not None and self._spelling is not None
        if trigger is not None:
            return Triggered(matcher, self._tokenizer.vocab_size, self._spelling, trigger)
        return Grammar(matcher.deep_copy(), self._tokenizer.vocab_size)  # 10 us

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise BadRequest(f"the grammar does not compile: {matcher.get_error()}")
        return matcher

    def _make_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._read_vocabulary is None:
            raise EngineError("this engine has no vocabulary for grammars")
        vocabulary = self._read_vocabulary()
        if not vocabulary.eos_ids:
            raise EngineError("the model has no end-of-generation token, which a grammar needs")
        self._spelling = Spelling.of(vocabulary)
        return LLTokenizer(_Wrapper(vocabulary), eos_token=vocabulary.eos_ids)  # type: ignore[arg-type]


class _Wrapper:
    """A vocabulary as llguidance reads it. Grammars ask for no forced tokens, so no text is ever tokenized."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.special_token_ids = vocabulary.tokens, vocabulary.special_ids
        self.eos_token_id = vocabulary.eos_ids[0]

    def __call__(self, text: str) -> list[int]:
        raise EngineError("a grammar may not force tokens")
