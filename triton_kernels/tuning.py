"""What is launched for which shape, by architecture: `tuned/*.json`, read once. Nothing is tuned at a user's start.

A file is named for the least compute capability that it serves; `other.json` serves AMD's and Intel's devices. Its `source`
says whether its numbers were measured or predicted. Numbers are counts: rows of x or W, groups of 32 weights, keys, logits.

OLLAMAPY_BATCH_INVARIANT leaves one path for any number of rows, so that a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ollamapy import env
from ollamapy.gguf.types import GGMLType
from ollamapy.triton_kernels.layout import Planes

FOLDER = Path(__file__).with_name("tuned")


class Tile(NamedTuple):
    """Of a matmul kernel: rows of x, rows of W, groups of K at a time, and how it is compiled."""

    rows: int
    columns: int
    groups: int
    num_warps: int
    num_stages: int


EXACT_TILES = (Tile(16, 32, 2, 4, 2), Tile(32, 64, 1, 4, 2))
"""Of float32 products, which no tensor core does exactly: by FMA, so registers set their size. Untried, as all numbers here."""


@dataclass(frozen=True, slots=True)
class Table:
    """One architecture's numbers."""

    source: str
    matvec_rows: int  # up to these rows of x: the matvec kernel (at most 4)
    matvec_pairs: int  # up to these pairs of a token and an expert: a matvec each
    int8_rows: int  # up to these: tiles on int8 activations; 0: never
    dp4a_rows: int  # of the CUDA kernels: up to these the matvec with dp4a, above it mma
    mma_rows: int  # of the CUDA kernels: above these a matrix is decoded for a dense product, as from dense_rows on
    dense_rows: int  # from these on, decoding a layer costs less than tiles lose to a dense matmul
    programs: int  # below that many, K is split: two for each multiprocessor
    matvec: Tile
    tiles: tuple[Tile, ...]  # by rows of x: the first that holds them all, else the last
    int8_tiles: tuple[Tile, ...]
    draw_logits: int  # that a row's program looks at together when it draws a token: more would be spilled
    split_keys: int  # of one program when decoding
    activations: str  # the type between kernels: bfloat16 or float16
    by_type: dict[str, dict[str, Any]]  # `matvec`, `tiles` or `int8_tiles` of types that would spill in those above

    def tile(self, rows: int) -> Tile:
        return next((tile for tile in self.tiles if rows <= tile.rows), self.tiles[-1])

    def int8_tile(self, rows: int) -> Tile:
        return next((tile for tile in self.int8_tiles if rows <= tile.rows), self.int8_tiles[-1])


@cache
def read(name: str) -> Table:
    """tuned/`name`.json. Every field must be there, and no other."""
    content = json.loads((FOLDER / f"{name}.json").read_text())
    assert content.keys() == {field.name for field in fields(Table)}, f"{name}.json: {sorted(content)}"

    def read_tiles(rows: dict[str, list[Any]]) -> dict[str, Any]:
        found = {key: Tile(*rows[key]) if key == "matvec" else tuple(Tile(*row) for row in rows[key]) for key in rows}
        assert found.keys() <= {"matvec", "tiles", "int8_tiles"}, f"{name}.json: {list(found)}"
        for tile in (tile for key, tiles in found.items() for tile in ([tiles] if key == "matvec" else tiles)):
            assert all(size & (size - 1) == 0 for size in tile[:4]), f"{name}.json: {tile} has no powers of two"
        same = {tile[1:3] for tile in found.get("int8_tiles", ())}
        assert len(same) <= 1, f"{name}.json: a row of int8 must not see its batch's size"
        return found

    own = {type: read_tiles(rows) for type, rows in content.pop("by_type").items()}
    assert own.keys() <= GGMLType.__members__.keys(), f"{name}.json: {list(own)}"
    common = read_tiles({key: content.pop(key) for key in ("matvec", "tiles", "int8_tiles")})
    table = Table(**content, **common, by_type=own)
    assert table.matvec_rows <= 4 and table.activations in ("bfloat16", "float16"), name
    return table


def name_for(capability: int) -> str:
    """The file of a compute capability (90 for 9.0): that of the nearest below."""
    known = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.json"))
    return f"sm_{max(number for number in known if number <= max(capability, known[0]))}"


@cache
def invariant() -> bool:
    """Whether a row's bits must not depend on its batch."""
    return env.load().batch_invariant


def one_path(table: Table) -> Table:
    """The table that knows one kernel for any number of rows: tiles on int8 activations, and for experts one size of tiles."""
    by_type = {
        type: {key: tiles[:1] if key == "tiles" else tiles for key, tiles in own.items()} for type, own in table.by_type.items()
    }
    only = replace(table, matvec_rows=0, matvec_pairs=0, int8_rows=sys.maxsize, mma_rows=sys.maxsize)
    return replace(only, tiles=table.tiles[:1], by_type=by_type)


@cache
def of(device: torch.device) -> Table:
    """The numbers for a device. A CPU, which interprets, takes those of an H100."""
    name = "sm_90" if device.type == "cpu" else "other"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        name = name_for(10 * major + minor)
    return one_path(read(name)) if invariant() else read(name)


def of_weight(weight: Planes) -> Table:
    """The numbers for a matrix: its type may have tiles of its own, and one that is multiplied precisely knows no int8 and no
    16-bit products. Where bits must not depend on the batch, it has one size of tiles, and K is not split by their number."""
    table = of(weight.low.device)
    if not weight.precise:
        own = table.by_type.get(weight.type.name)
        return replace(table, **own) if own else table
    table = replace(table, int8_rows=0, dense_rows=sys.maxsize, tiles=EXACT_TILES)
    return replace(table, tiles=EXACT_TILES[:1], programs=1) if invariant() else table


def activations(device: torch.device, precise: bool = False) -> torch.dtype:
    """The type of hidden states between kernels, and of products: float32 where they are interpreted, or shall be exact."""
    found: torch.dtype = torch.float32 if precise or device.type == "cpu" else getattr(torch, of(device).activations)
    return found
