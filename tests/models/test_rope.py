"""Rotary tables: what grows, and what must not."""

from __future__ import annotations

import pytest
import torch

from ollamapy.layers.rope import FIRST_POSITIONS, RotaryTable, inverse_frequencies
from ollamapy.layers.spec import Rope, RopeScaling

INVERSE = inverse_frequencies(Rope(8, 10000.0, RopeScaling()))
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_are_those_of_the_turns(interleaved: bool) -> None:
    table = RotaryTable(INVERSE, 1.5, interleaved, CPU)
    positions = torch.tensor([0, 3, 2 * FIRST_POSITIONS + 5])
    cos, sin = table.rows(positions, 2 * FIRST_POSITIONS + 6)
    pairs = torch.arange(8) // 2 if interleaved else torch.arange(8) % 4
    angles = (positions.unsqueeze(1).float() * INVERSE)[:, pairs].unsqueeze(1)
    signs = torch.where(torch.arange(8) % 2 == 0 if interleaved else torch.arange(8) < 4, -1.0, 1.0)
    assert torch.equal(cos, angles.cos() * 1.5) and torch.equal(sin, angles.sin() * 1.5 * signs)


def test_a_gpu_has_all_positions_from_the_first() -> None:
    """A table that grew would take memory that blocks have by then, and recorded steps read it where it was."""
    table = RotaryTable(INVERSE, 1.0, False, META, 5000)
    first = table.turns(1)
    assert first.shape == (5000, 8) and table.turns(5000) is first
    with pytest.raises(AssertionError):
        table.turns(5001)
