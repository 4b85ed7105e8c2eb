"""Siblings: requests of one caller with the same prompt, like the `n` choices of one answer. Knows no pool and no tensors.

The first of them computes the prompt; the others are held until it is in the cache, and share its blocks then. When it leaves
before that, the next takes its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable

from ollamapy.engine.block_check import GONE
from ollamapy.engine.blocks import Hit
from ollamapy.engine.sequence import Sequence


class Siblings:
    """The families that are there: the first of each, and those held behind it."""

    def __init__(self) -> None:
        self._family: dict[Sequence, Hashable] = {}
        self._first: dict[Hashable, Sequence] = {}
        self._held: dict[Hashable, list[Sequence]] = {}

    @property
    def held(self) -> Iterable[Sequence]:
        return (seq for held in self._held.values() for seq in held)

    @property
    def num_held(self) -> int:
        return sum(map(len, self._held.values()))

    def arrive(self, seq: Sequence) -> bool:
        """Whether a new sequence is held."""
        family = self._family[seq] = seq.caller, seq.salt, seq.token_ids.tobytes()
        first = self._first.setdefault(family, seq)
        if first is seq or _has_prompt(first):
            return False
        self._held.setdefault(family, []).append(seq)
        return True

    def computed(self, seq: Sequence) -> list[Sequence]:
        """Those that need not be held any more, when `seq` has moved on."""
        if not self._held or not _has_prompt(seq):
            return []
        return self._held.pop(self._family[seq], []) if seq in self._family else []

    def leave(self, seq: Sequence) -> Sequence | None:
        """`seq` has ended, or no longer has its prompt. The one that is to compute the prompt in its place, if any is held."""
        family = self._family.pop(seq, None)
        if family is None:
            return None
        held, heir = self._held.get(family, []), None
        if seq in held:
            held.remove(seq)
        elif self._first.get(family) is seq:
            del self._first[family]
            if held:
                heir = self._first[family] = held.pop(0)
        if not held:
            self._held.pop(family, None)
        return heir

    def is_held(self, seq: Sequence) -> bool:
        return seq in self._held.get(self._family.get(seq), ())

    def extended(self, seq: Sequence, found: Hit, block_size: int) -> Hit:
        """`found`, and the block in which the first of the family has the rest of the prompt but its last token.

        Only for one that has generated nothing. Where the block is full, or only a part of the prompt was found, nothing is
        added: blocks are shared from the first one on.
        """
        last, rest = divmod(len(seq.token_ids) - 1, block_size)
        first = self._first.get(self._family.get(seq))
        if first is None or first is seq or not rest or found.num_blocks < last or seq.num_generated or not _has_prompt(first):
            return found
        blocks = [table[last] for table in first.block_tables]
        if GONE in blocks:
            return found
        tables = [table + array("i", [block]) for table, block in zip(found.tables, blocks, strict=True)]
        return Hit(len(seq.token_ids) - 1, tables)


def _has_prompt(seq: Sequence) -> bool:
    return seq.num_computed >= seq.num_prompt_tokens
