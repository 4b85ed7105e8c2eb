"""What can be wrong with a pool's books, and the words for it. Reads what BlockManager believes; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, NamedTuple

from ollamapy.engine.sequence import Sequence

if TYPE_CHECKING:
    from ollamapy.engine.blocks import BlockManager

GONE = -1  # a table's entry behind the window


class Books(NamedTuple):
    references: list[int]
    free: list[int]
    cached: Mapping[int, None]
    known: list[tuple[int, bytes] | None]  # group and hash of a block's content
    block_of: list[dict[bytes, int]]  # by group


def problems_of(blocks: BlockManager, sequences: Iterable[Sequence]) -> list[str]:
    """What is wrong, given all sequences that may hold blocks; empty when nothing is."""
    books = blocks.books()
    sequences = [seq for seq in sequences if seq.block_tables]
    problems = [problem for seq in sequences for problem in _problems_of_tables(blocks, seq)]
    held = Counter(block for seq in sequences for table in seq.block_tables for block in table if block != GONE)
    free, cached = set(books.free), set(books.cached)
    if len(free) != len(books.free):
        problems.append("a block is free twice")
    if free & cached or free & held.keys() or cached & held.keys():
        problems.append("a block is in two states")
    if len(free) + len(cached) + len(held) != blocks.num_blocks:
        problems.append(f"{len(free)} free + {len(cached)} cached + {len(held)} used != {blocks.num_blocks} blocks")
    wrong = [block for block, count in enumerate(books.references) if count != held.get(block, 0)]
    if wrong:
        problems.append(f"references of blocks {wrong[:8]} do not match the block tables")
    named = {(group, digest): block for group, of in enumerate(books.block_of) for digest, block in of.items()}
    if any(books.known[block] != name for name, block in named.items()):
        problems.append("a prefix hash names a block of other content")
    if sum(name is not None for name in books.known) != len(named):
        problems.append("a block keeps a hash that the prefix cache does not know")
    if any(books.known[block] is not None for block in free) or any(books.known[block] is None for block in cached):
        problems.append("a free block has a hash or a cached one has none")
    return problems


def _problems_of_tables(blocks: BlockManager, seq: Sequence) -> list[str]:
    problems = []
    held = [block for table in seq.block_tables for block in table if block != GONE]
    if len(set(held)) != len(held):
        problems.append("a block is twice in the tables of one sequence")
    if len(seq.block_tables) != len(blocks.windows) or len({len(table) for table in seq.block_tables}) != 1:
        return [*problems, f"request {seq.request_id} has tables of different lengths"]
    for window, table in zip(blocks.windows, seq.block_tables, strict=True):
        gone, seen = num_gone(table), blocks.first_seen(window, seq.num_computed)
        if gone != min(seen, len(table)) or GONE in table[gone:]:
            problems.append(f"request {seq.request_id} holds blocks behind a window of {window}, or lacks some within")
    return problems


def num_gone(table: ListLike[int]) -> int:
    return next((index for index, block in enumerate(table) if block != GONE), len(table))
