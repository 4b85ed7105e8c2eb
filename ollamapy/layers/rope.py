"""Rotary embeddings: frequencies with their scalings, and the table of cosines and sines that all layers share.

Formulas: Su et al. 2021; linear: Chen et al. 2023; yarn: Peng et al. 2023; longrope: Ding et al. 2024. The scaling of
llama 3 needs none here: its converter writes divisors of the frequencies (`rope_freqs`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ollamapy.layers.layer import Declared, Layer
from ollamapy.layers.spec import Rope, RopeScaling

FIRST_POSITIONS = 1024  # rows of a new table on a CPU; it doubles when a position lies beyond


class RopeFactors(Layer):
    """Divisors of the inverse frequencies (n_rot / 2), a tensor of the file: `rope_freqs`, `rope_factors_long` ..."""

    weight: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__(weight=Declared((dims // 2,), "dense"))


def inverse_frequencies(rope: Rope, divisors: Tensor | None = None) -> Tensor:
    """(n_rot / 2) float32: the angle by which each pair turns per position."""
    steps = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    inverse = 1.0 / (rope.base**steps)
    if divisors is not None:
        inverse = inverse / divisors.cpu()
    if rope.scaling.type == "linear":
        return inverse / rope.scaling.factor
    if rope.scaling.type == "yarn":
        ramp = _yarn_ramp(rope)
        return inverse / rope.scaling.factor * ramp + inverse * (1.0 - ramp)
    return inverse


def _yarn_ramp(rope: Rope) -> Tensor:
    """0 for pairs that keep their frequency (they turn often within the trained context), 1 for those that are stretched."""
    scaling, pairs = rope.scaling, rope.dims // 2

    def pair_with(rotations: float) -> float:
        turns = scaling.original_context_length / (rotations * 2.0 * math.pi)
        return rope.dims * math.log(turns) / (2.0 * math.log(rope.base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), rope.dims - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(pairs, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)


def magnitude(scaling: RopeScaling, context_length: int) -> float:
    """What cosines and sines are multiplied with, to make up for the flatter attention of long contexts."""
    if scaling.type == "yarn":
        own = _log_magnitude(scaling.factor, 1.0)
        if scaling.log_multiplier:
            own /= _log_magnitude(scaling.factor, scaling.log_multiplier)
        return own * (scaling.attn_factor or 1.0)
    if scaling.type == "longrope" and not scaling.attn_factor:
        stretch = max(context_length / scaling.original_context_length, 1.0)
        return math.sqrt(1.0 + math.log(stretch) / math.log(scaling.original_context_length))
    return scaling.attn_factor or 1.0


def _log_magnitude(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0


class RotaryTable:
    """Cosines and sines by position. On a CPU it grows when it is asked for more positions; elsewhere `positions` are all that
    there are, so that the memory is taken before KV blocks get the rest, and recorded steps find it where it was."""

    def __init__(
        self, inverse: Tensor, magnitude: float, interleaved: bool, device: torch.device, positions: int = FIRST_POSITIONS
    ) -> None:
        self._inverse, self._magnitude, self._interleaved, self._device = inverse, magnitude, interleaved, device
        self._build(FIRST_POSITIONS if device.type == "cpu" else positions)

    def turns(self, length: int) -> Tensor:
        """(at least `length`, n_rot): the cosines of the pairs, then their sines, as `ops.stack` wants them."""
        if length > self._turns.shape[0]:
            assert self._device.type == "cpu", f"{length} positions of a table of {self._turns.shape[0]}"
            self._build(1 << (length - 1).bit_length())
        return self._turns

    def rows(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (n, 1, n_rot), as `ops.rope` wants them, of positions (n,) that lie below `length`."""
        cos, sin = self.turns(length)[positions].unsqueeze(1).chunk(2, -1)
        if self._interleaved:
            return torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def _build(self, length: int) -> None:
        angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * self._inverse
        self._turns = torch.cat((angles.cos(), angles.sin()), -1).mul_(self._magnitude).to(self._device)
