"""The dense gated feed-forward: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import AdapterRows
from ollamapy.layers.layer import Part
from ollamapy.layers.linear import Linear
from ollamapy.layers.spec import FeedForwardSpec


class GatedMLP(Part):
    """(n, E) -> (n, E), with gate and up as two tensors."""

    def __init__(self, spec: FeedForwardSpec, embedding_length: int) -> None:
        self.activation = spec.activation
        self.ffn_gate = Linear(embedding_length, spec.length)
        self.ffn_up = Linear(embedding_length, spec.length)
        self.ffn_down = Linear(spec.length, embedding_length)

    def matrices(self) -> dict[str, Linear]:
        """By their part in `ops.DecoderLayer`."""
        return {"gate": self.ffn_gate, "up": self.ffn_up, "down": self.ffn_down}

    def __call__(self, x: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        gate, up = self.ffn_gate(x, adapters), self.ffn_up(x, adapters)
        return self.ffn_down(ops.gated_activation(gate, up, self.activation), adapters)


class FusedGatedMLP(Part):
    """(n, E) -> (n, E); one tensor ffn_up (2F, E) has the rows of the gate, then those of up."""

    def __init__(self, spec: FeedForwardSpec, embedding_length: int) -> None:
        self.activation = spec.activation
        self.ffn_up = Linear(embedding_length, 2 * spec.length)
        self.ffn_down = Linear(spec.length, embedding_length)

    def matrices(self) -> dict[str, Linear]:
        """By their part in `ops.DecoderLayer`."""
        return {"gate": self.ffn_up, "down": self.ffn_down}

    def __call__(self, x: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        gate, up = self.ffn_up(x, adapters).chunk(2, dim=-1)
        return self.ffn_down(ops.gated_activation(gate, up, self.activation), adapters)
