"""SentencePiece's precompiled normalization table: the longest known sequence of characters at each place is replaced.

The table is a length, a double-array trie (Darts-clone units of 32 bits) and the replacements, ended by zeros. The
`tokenizers` library applies it per grapheme cluster and so drops the line feed of CR LF, among others.
"""

from __future__ import annotations

from array import array
from sys import byteorder

from ollamapy.tokenizer.vocabulary import wrong

_KEY = "precompiled_charsmap"
_CACHED_PAIRS = 1 << 16
_LONGEST = 64  # characters replaced at once; NFKC's longest is 18. Keeps a looping trie from following the whole text


class CharsMap:
    def __init__(self, table: bytes) -> None:
        """`table` begins with the length of a trie that it is long enough for."""
        size = int.from_bytes(table[:4], "little")
        self._units = array("I", table[4 : 4 + size])
        if byteorder == "big":
            self._units.byteswap()
        self._replacements = table[4 + size :]
        # Two characters -> (how many are replaced, by what), where these two alone decide it.
        self._cache: dict[str, tuple[int, str]] = {}

    def normalize(self, text: str) -> str:
        """Raises TokenizerError when the table points outside itself."""
        parts: list[str] = []
        position = 0
        while position < len(text):
            found = self._cache.get(text[position : position + 2])
            if found is None:
                found = self._longest(text, position)
            count, replacement = found
            parts.append(replacement)
            position += count
        return "".join(parts)

    def _longest(self, text: str, start: int) -> tuple[int, str]:
        units, node = self._units, _offset(self._units[0])
        found = (1, text[start])
        end = start
        for end in range(start, min(len(text), start + _LONGEST)):
            leaf = 0
            for byte in text[end].encode():
                node ^= byte
                unit = self._unit(node)
                if unit & 0x800000FF != byte or byte == 0:
                    break
                node ^= _offset(unit)
                leaf = unit & 0x100
            else:
                if leaf:
                    found = (end + 1 - start, self._replacement(units[node] & 0x7FFFFFFF if node < len(units) else -1))
                continue
            break
        if end <= start + 1:
            if len(self._cache) >= _CACHED_PAIRS:
                self._cache.clear()
            self._cache[text[start : start + 2]] = found
        return found

    def _unit(self, node: int) -> int:
        if node >= len(self._units):
            raise wrong(_KEY, f"node {node} of a trie of {len(self._units)}")
        return self._units[node]

    def _replacement(self, start: int) -> str:
        end = self._replacements.find(b"\0", start) if 0 <= start < len(self._replacements) else -1
        if end < 0:
            raise wrong(_KEY, f"replacement {start} is outside the table")
        try:
            return self._replacements[start:end].decode()
        except UnicodeDecodeError:
            raise wrong(_KEY, f"replacement {start} is not UTF-8") from None


def _offset(unit: int) -> int:
    """What leads from a node to its children, by exclusive or."""
    return (unit >> 10) << ((unit & 0x200) >> 6)
