"""Which tokens mean something: ids by key, tokens that end a generation, ids never to sample, and what is put around a text.

Corrects token types where files have them wrong. Knows texts of tokens, nothing of cutting text.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from ollamapy.tokenizer.pretokenize import pretokenizer
from ollamapy.tokenizer.vocabulary import TokenType, Vocabulary, wrong

log = logging.getLogger(__name__)

_ID_KEYS = {  # name -> keys under tokenizer.ggml., the first present one wins
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "sep": ("seperator_token_id",),  # the format's spelling
    "pad": ("padding_token_id",),
    "cls": ("cls_token_id",),
    "mask": ("mask_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
}
_DEFAULT_IDS = {
    "spm": {"bos": 1, "eos": 2, "unk": 0},
    "bpe": {"bos": 11, "eos": 11},
    "wordpiece": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "unigram": {"eos": 1, "unk": 2, "pad": 0},
}
_DECISIVE = {"bos", "eos", "eot", "eom"}  # a wrong one changes what is generated; the others may be out of range
_UNSET = {-1, 0xFFFFFFFF}  # how converters write "none"

_FIM_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # structure that the harmony parser reads
_PADDING = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True, slots=True)
class Special:
    """`ids` by name (bos, eos, eot, eom, unk, sep, pad, cls, mask, fim_*), where set; `prefix` and `suffix` are the ids
    that `add_special` puts around a text."""

    ids: dict[str, int]
    eog_ids: frozenset[int]
    suppress_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def read_special(vocabulary: Vocabulary) -> Special:
    """Reads the special tokens and corrects `vocabulary.types`. Raises TokenizerError."""
    ids = _ids_by_key(vocabulary)
    _ids_by_text(vocabulary, ids)
    eog_ids = _end_of_generation(vocabulary, ids)
    prefix, suffix = _frame(vocabulary, ids)
    return Special(ids, eog_ids, _suppressed(vocabulary), prefix, suffix)


def _ids_by_key(vocabulary: Vocabulary) -> dict[str, int]:
    num_tokens = len(vocabulary.tokens)
    ids = {name: id for name, id in _DEFAULT_IDS[vocabulary.kind].items() if id < num_tokens}
    if vocabulary.pre == "gemma4" or (vocabulary.kind == "bpe" and pretokenizer(vocabulary.pre).no_bos):
        ids.pop("bos", None)
    for name, keys in _ID_KEYS.items():
        for key in reversed(keys):
            id = vocabulary.fields.integer(key)
            if id is None or id in _UNSET:
                continue
            if 0 <= id < num_tokens:
                ids[name] = id
            elif name in _DECISIVE:
                raise wrong(key, f"{id} is outside the vocabulary of {num_tokens} tokens")
            else:
                log.warning("ignoring tokenizer.ggml.%s = %d: the vocabulary has %d tokens", key, id, num_tokens)
    if vocabulary.kind == "wordpiece" and "bos_token_id" not in vocabulary.fields and "cls" in ids:
        ids["bos"] = ids["cls"]
    # Files of Llama 3 made before it had a pre-tokenizer's name end at <|end_of_text|>, which its turns never do.
    eot = vocabulary.index.get("<|eot_id|>")
    if "pre" not in vocabulary.fields and vocabulary.pre == "llama-bpe" and ids.get("eos") == 128001 and eot == 128009:
        ids["eos"] = eot
    return ids


def _ids_by_text(vocabulary: Vocabulary, ids: dict[str, int]) -> None:
    """Finds the fill-in-the-middle tokens that no key names; whatever their type says, they are control tokens."""
    for name, texts in _FIM_TEXTS.items():
        found = next((id for text in texts.split() if (id := vocabulary.index.get(text)) is not None), None)
        if name not in ids and found is not None:
            ids[name] = found
            vocabulary.types[found] = TokenType.CONTROL


def _end_of_generation(vocabulary: Vocabulary, ids: dict[str, int]) -> frozenset[int]:
    """Ids that end a generation, by key and by text. Tokens found by text become control tokens."""
    index, types = vocabulary.index, vocabulary.types
    by_text = {text: index[text] for text in _END_TEXTS.split() if text in index}
    for id in by_text.values():
        types[id] = TokenType.CONTROL
    for text in _SHOWN_TEXTS:
        if text in index:
            types[index[text]] = TokenType.USER_DEFINED
    ends = {ids[name] for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if name in ids}
    ends.update(by_text.values(), _more_ends(vocabulary))
    # gpt-oss and Solar close a message with <|end|> and go on with the next one of the same answer.
    calls = bool(by_text.keys() & {"<|call|>", "<|calls|>"})
    if calls and by_text.keys() & {"<|return|>", "<|flush|>"} and "<|end|>" in by_text:
        ends.discard(by_text["<|end|>"])
        types[by_text["<|end|>"]] = TokenType.USER_DEFINED
    # Gemma 4 has </s> as plain text.
    if {"<|tool_response>", "</s>"} <= by_text.keys():
        ends.discard(by_text["</s>"])
        types[by_text["</s>"]] = TokenType.NORMAL
    return frozenset(ends)


def _more_ends(vocabulary: Vocabulary) -> list[int]:
    """Ollama's own key: every stop id of the model's generation config."""
    if "eos_token_ids" not in vocabulary.fields:
        return []
    ends = vocabulary.fields.integers("eos_token_ids")
    for id in ends:
        if not 0 <= id < len(vocabulary.tokens):
            raise wrong("eos_token_ids", f"{id} is outside the vocabulary of {len(vocabulary.tokens)} tokens")
    return ends


def _suppressed(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids never to sample: unused tokens, the [PADn] that fill a vocabulary up, and those a key lists.

    Control tokens called "unused" stay: fine-tunes put them to use (MedGemma thinks between two of them).
    """
    num_tokens = len(vocabulary.tokens)
    suppressed = set(vocabulary.of_type(TokenType.UNUSED))
    if "suppress_tokens" in vocabulary.fields:
        suppressed.update(id for id in vocabulary.fields.integers("suppress_tokens") if 0 <= id < num_tokens)
    id = num_tokens - 1
    while id >= 0 and _PADDING.fullmatch(vocabulary.tokens[id]):  # padding is at the end, or nowhere
        suppressed.add(id)
        id -= 1
    return tuple(sorted(suppressed))


def _frame(vocabulary: Vocabulary, ids: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What goes before and after a text. BERT always has [CLS] and [SEP]; `add_sep_token` speaks of pairs of texts."""
    if vocabulary.kind == "wordpiece":
        return (_needed(ids, "bos", "cls_token_id"),), (_needed(ids, "sep", "seperator_token_id"),)
    add_bos, add_eos = vocabulary.kind == "spm", vocabulary.kind == "unigram"
    if vocabulary.kind == "bpe":
        add_bos = pretokenizer(vocabulary.pre).add_bos
    add_bos = vocabulary.fields.flag("add_bos_token", add_bos) or vocabulary.pre == "gemma4"
    add_eos = vocabulary.fields.flag("add_eos_token", add_eos)
    prefix = (_needed(ids, "bos", "bos_token_id"),) if add_bos else ()
    suffix = (_needed(ids, "eos", "eos_token_id"),) if add_eos else ()
    return prefix, suffix


def _needed(ids: dict[str, int], name: str, key: str) -> int:
    if name not in ids:
        raise wrong(key, f"is not set, and the tokenizer adds a {name} token to texts")
    return ids[name]
