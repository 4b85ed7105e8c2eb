"""What is measured, and the figures of one engine on one file: samples, medians, spread. Pure: runs nothing, prints nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Samples = dict[str, list[float]]
"""Column -> tokens/s of each repetition."""

PROMPT = 512  # tokens of the prefill column
DECODE = 128  # tokens generated one by one, from an empty context, for the decode column of one sequence
BATCHES = (4, 8, 16, 32)
BATCH_PROMPT, BATCH_DECODE = 64, 32  # per sequence of the batch columns
PREFILL, SINGLE, SINGLE_ONE_THREAD = "prefill512", "decode1", "decode1 1thread"


@dataclass(frozen=True, slots=True)
class Work:
    """Which columns to measure, how often, on how many threads."""

    threads: int
    repeats: int = 3
    prefill: bool = True
    single: bool = True
    batches: tuple[int, ...] = BATCHES

    @property
    def columns(self) -> list[str]:
        single = SINGLE if self.threads != 1 else SINGLE_ONE_THREAD
        return [PREFILL] * self.prefill + [single] * self.single + [batch_column(size) for size in self.batches]

    @property
    def single_column(self) -> str:
        return SINGLE if self.threads != 1 else SINGLE_ONE_THREAD


def batch_column(size: int) -> str:
    return f"decode{size}"


def merge(parts: Iterable[Samples]) -> Samples:
    """All turns' samples of each column, in order."""
    merged: Samples = {}
    for part in parts:
        for column, values in part.items():
            merged.setdefault(column, []).extend(values)
    return merged


def median(samples: Mapping[str, list[float]], column: str) -> float | None:
    values = samples.get(column)
    return statistics.median(values) if values else None


def spread(samples: Mapping[str, list[float]], column: str) -> float | None:
    """(largest - least) / median: how far the samples lie apart."""
    values = samples.get(column)
    return (max(values) - min(values)) / statistics.median(values) if values else None


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def fraction_of_read(model: Mapping[str, Any], limits: Mapping[str, float], tokens_per_second: float | None) -> float | None:
    """Of the bandwidth that the machine was measured to read with, by the weights that one token reads."""
    peak = limits.get("read_gbs")
    return tokens_per_second * model["decode_bytes"] / 1e9 / peak if tokens_per_second and peak else None


def fraction_of_dots(model: Mapping[str, Any], limits: Mapping[str, float], tokens_per_second: float | None) -> float | None:
    """Of the int8 dot products that the machine was measured to do, by the matrices that each prompt token goes through."""
    peak = limits.get("vnni_gmacs")
    return tokens_per_second * model["prefill_macs"] / 1e9 / peak if tokens_per_second and peak else None
