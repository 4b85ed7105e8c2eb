"""BlockHash: the names of prefix blocks. Knows no pool."""

from __future__ import annotations

import hashlib
import secrets

from ollamapy.engine.sequence import Sequence


class BlockHash:
    """Of a block of a sequence: covers its tokens, all before them (a chain) and what else keys and values depend on or may be
    shared by (`Sequence.salt`). It is 128 bits long and keyed with a secret, so two different prefixes never meet, not even by
    intent."""

    def __init__(self, block_size: int, key: bytes = b"") -> None:
        self._block_size, self._key = block_size, key or secrets.token_bytes(16)

    def __call__(self, seq: Sequence, index: int) -> bytes:
        """Of block `index`; computed once per sequence."""
        hashes, size = seq.block_hashes, self._block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hashlib.blake2b(seq.salt, digest_size=16, key=self._key).digest()
            content = parent + seq.token_ids[start : start + size].tobytes()
            hashes.append(hashlib.blake2b(content, digest_size=16, key=self._key).digest())
        return hashes[index]
