"""Text to token ids and back, for any tokenizer that GGUF metadata describes. Knows no chat formats and no model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ollamapy.errors import TokenizerError
from ollamapy.tokenizer.added import AddedToken, AddedTokens
from ollamapy.tokenizer.bpe import ByteLevelBPE, PlainBPE, decode_byte_alphabet
from ollamapy.tokenizer.merge import SPACE
from ollamapy.tokenizer.pretokenize import pretokenizer
from ollamapy.tokenizer.special import Special, read_special
from ollamapy.tokenizer.spm import SentencePiece
from ollamapy.tokenizer.stream import StreamDecoder
from ollamapy.tokenizer.unigram import Unigram
from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary
from ollamapy.tokenizer.wordpiece import WordPiece

_MAX_KEPT = 8  # answers of `holding`


class _Model(Protocol):
    def encode(self, text: str, at_start: bool) -> list[int]: ...


class Tokenizer:
    """Immutable once made; every method may be called from several threads at once.

    vocab_size: number of tokens; an embedding with more rows has ids from here on that must never be sampled.
    suppress_ids: ids below vocab_size that must never be sampled (unused tokens, padding, those a key lists).
    eog_ids: ids that end a generation. special_ids: name (bos, eos, eot, eom, unk, sep, pad, cls, mask, fim_pre, fim_suf,
    fim_mid, fim_pad, fim_rep, fim_sep) -> id, of those that are set.
    strips_first_space: decoding drops one leading space, which encoding had put there.
    """

    def __init__(self, vocabulary: Vocabulary, special: Special, model: _Model) -> None:
        self._tokens, self._types, self._model = vocabulary.tokens, vocabulary.types, model
        self.vocab_size = len(vocabulary.tokens)
        self.special_ids = special.ids
        self.bos_id, self.eos_id = special.ids.get("bos"), special.ids.get("eos")
        self.eog_ids, self.suppress_ids = special.eog_ids, special.suppress_ids
        self._prefix, self._suffix = special.prefix, special.suffix
        self.add_bos, self.add_eos = bool(special.prefix), bool(special.suffix)
        self._byte_alphabet = isinstance(model, ByteLevelBPE)
        self.strips_first_space = isinstance(model, WordPiece) or (
            isinstance(model, (SentencePiece, Unigram)) and vocabulary.fields.flag("add_space_prefix", True)
        )
        added = _added_tokens(vocabulary)
        self._all_added = AddedTokens(added)
        self._user_defined = AddedTokens(token for token in added if self._types[token.id] == TokenType.USER_DEFINED)
        self._bytes: dict[int, bytes] = {}
        self._shown: dict[int, bytes] = {}
        self._holding: OrderedDict[tuple[str, ...], tuple[int, ...]] = OrderedDict()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, embedding_rows: int | None = None) -> Tokenizer:
        """Raises TokenizerError naming the key that is missing, malformed or of an unknown kind.

        `embedding_rows`: where the model has fewer rows than the file has tokens, the tokens without one are dropped.
        """
        vocabulary = Vocabulary.read(metadata, embedding_rows)
        special = read_special(vocabulary)
        return cls(vocabulary, special, _model(vocabulary, special.ids.get("unk")))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `parse_special`: texts of control tokens become those tokens; user-defined tokens are found in either case.
        `add_special`: puts the model's bos and eos (or cls and sep) around the ids, as its keys say. A bos that the text
        begins with already, as rendered templates do, is not doubled, nor an eos at its end.
        """
        text = _without_surrogates(text)
        ids: list[int] = []
        at_start = True
        for part in (self._all_added if parse_special else self._user_defined).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(part, at_start)
            at_start = isinstance(part, int)
        if not add_special:
            return ids
        prefix = () if ids[:1] == list(self._prefix) else self._prefix
        suffix = () if ids[-1:] == list(self._suffix) else self._suffix
        return [*prefix, *ids, *suffix]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. Raises TokenizerError for an id outside the vocabulary."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return decoder.feed(ids) + decoder.flush()

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, possibly part of a character; of a control token its text."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._to_bytes(self.token_text(id), self._types[id])
        return found

    def shown_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to the text: `token_bytes`, none for a control token."""
        found = self._shown.get(id)
        if found is None:
            found = self._shown[id] = b"" if self.is_control(id) else self.token_bytes(id)
        return found

    def holding(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        """Ids of the tokens whose bytes hold one of `texts`: 0.3 s for 262,144 tokens, unless these were asked for lately."""
        found = self._holding.get(texts)
        if found is None:
            wanted = [text.encode() for text in map(_without_surrogates, texts) if text]
            whole = (self._to_bytes(text, type) for text, type in zip(self._tokens, self._types, strict=True))
            found = tuple(id for id, own in enumerate(whole) if any(text in own for text in wanted))
            self._holding[texts] = found
            while len(self._holding) > _MAX_KEPT:
                self._holding.popitem(last=False)
        return found

    def token_text(self, id: int) -> str:
        """The token as the vocabulary writes it."""
        self._check(id)
        return self._tokens[id]

    def is_control(self, id: int) -> bool:
        """True for tokens that are not part of the text: control and unknown tokens."""
        self._check(id)
        return self._types[id] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size} tokens")

    def _to_bytes(self, text: str, type: int) -> bytes:
        if type == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            return text.encode()
        if self._byte_alphabet:
            return decode_byte_alphabet(text)
        return text.replace(SPACE, " ").encode()


def _model(vocabulary: Vocabulary, unk_id: int | None) -> _Model:
    if vocabulary.kind == "bpe":
        rules = pretokenizer(vocabulary.pre)
        return PlainBPE(vocabulary, unk_id) if rules.plain else ByteLevelBPE(vocabulary, rules)
    models: dict[str, Callable[[Vocabulary, int | None], _Model]] = {
        "spm": SentencePiece,
        "wordpiece": WordPiece,
        "unigram": Unigram,
    }
    return models[vocabulary.kind](vocabulary, unk_id)


def _added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    """Control, unknown and user-defined tokens. GGUF does not carry who eats the white space around it: that goes by name."""
    name, architecture = vocabulary.fields.general("name").lower(), vocabulary.fields.general("architecture")
    lstrip: set[str] = set()
    keep_right: set[str] | None = None
    if vocabulary.pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or architecture in ("nomic-bert-moe", "jina-bert-v3"):
        lstrip = {"<mask>"}
    elif "phi-3" in name or "phi3" in name:
        keep_right = {"<unk>", "<s>", "<|endoftext|>"}
    elif "modern-bert" in name:
        lstrip = {"[MASK]"}
    return [
        AddedToken(text, id, lstrip=text in lstrip, rstrip=keep_right is not None and text not in keep_right)
        for id in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        for text in (vocabulary.tokens[id],)
    ]


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which JSON can bring, joined or replaced by U+FFFD: they have no UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
