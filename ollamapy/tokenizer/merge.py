"""Byte-pair merging over characters by a table of ranks, as SentencePiece does it: the best pair anywhere first, the left
one of equals. Serves vocabularies that cut text into words only by spaces; needs no list of merges to be built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush

SPACE = "▁"
_CACHED_PIECES = 10_000  # 450 bytes each, in all 5 MB; 65,536 of them looked like a leak of the daemon's for 60,000 requests
_CACHED_LENGTH = 64  # characters; longer pieces rarely come twice


class Merger:
    """`ranks`: left + `joint` + right -> rank, the lowest merged first. `ids`: text -> id. A character without an id
    becomes its bytes' tokens, or `unk_id` once for a run of such characters, or nothing."""

    def __init__(
        self, ranks: Mapping[str, float], joint: str, ids: Mapping[str, int], byte_ids: Mapping[int, int], unk_id: int | None
    ) -> None:
        self._ranks, self._joint, self._ids, self._byte_ids, self._unk_id = ranks, joint, ids, byte_ids, unk_id
        self._cache: dict[str, list[int]] = {}

    def encode(self, piece: str) -> list[int]:
        """Ids of one piece; the list belongs to the cache. Takes O(n log n) of n characters, about 1 µs each."""
        ids = self._cache.get(piece)
        if ids is None:
            ids = self._ids_of(self.merge(piece))
            if len(piece) <= _CACHED_LENGTH:
                if len(self._cache) >= _CACHED_PIECES:
                    self._cache.clear()
                self._cache[piece] = ids
        return ids

    def merge(self, piece: str) -> list[str]:
        """The piece cut into symbols that no rule merges further."""
        count, ranks, joint = len(piece), self._ranks, self._joint
        symbols = list(piece)  # the symbol that begins at a character; "" once it is part of one to its left
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[float, int, str]] = []  # rank, position of the left symbol, pair

        for i in range(count - 1):
            pair = symbols[i] + joint + symbols[i + 1]
            if (rank := ranks.get(pair)) is not None:
                heap.append((rank, i, pair))
        heapify(heap)
        while heap:
            _, i, pair = heappop(heap)
            left, j = symbols[i], after[i]
            if not left or j >= count or left + joint + symbols[j] != pair:
                continue  # one of the two has been merged with another since
            left += symbols[j]
            symbols[i], symbols[j] = left, ""
            j = after[i] = after[j]
            if j < count:
                before[j] = i
                pair = left + joint + symbols[j]
                if (rank := ranks.get(pair)) is not None:
                    heappush(heap, (rank, i, pair))
            if (p := before[i]) >= 0:
                pair = symbols[p] + joint + left
                if (rank := ranks.get(pair)) is not None:
                    heappush(heap, (rank, p, pair))
        return [symbol for symbol in symbols if symbol]

    def _ids_of(self, symbols: list[str]) -> list[int]:
        ids: list[int] = []
        unknown = False
        for symbol in symbols:
            id = self._ids.get(symbol)
            if id is not None:
                ids.append(id)
                unknown = False
                continue
            found = [self._byte_ids.get(byte) for byte in symbol.encode()]
            if None not in found:
                ids += [id for id in found if id is not None]
                unknown = False
            elif self._unk_id is not None and not unknown:
                ids.append(self._unk_id)
                unknown = True
        return ids


def piece_pattern(glue: Iterable[str], newline_runs: bool = False) -> re.Pattern[str]:
    """Cuts text (▁ for spaces) before each run of ▁, which no merge crosses unless a character of `glue` is before it.

    So the pieces' ids are exactly those of the whole text, and most pieces are words that come again. `newline_runs`: runs
    of newlines are pieces of their own.
    """
    other = f"[^{SPACE}\\n]" if newline_runs else f"[^{SPACE}]"
    glued = "".join(map(re.escape, sorted(set(glue))))
    if glued:
        other = f"(?:{other}|(?<=[{glued}]){SPACE}+)"
    newlines = r"\n+|" if newline_runs else ""
    return re.compile(f"{newlines}{SPACE}*{other}+|{SPACE}+")
