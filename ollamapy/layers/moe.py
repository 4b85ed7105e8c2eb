"""The feed-forward of many experts, of which each token uses a few."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import AdapterRows
from ollamapy.layers.layer import Declared, Layer, Part
from ollamapy.layers.linear import Linear
from ollamapy.layers.spec import ExpertsSpec, FeedForwardSpec


class Experts(Layer):
    """One matrix of all experts: (X, out, in)."""

    weight: ops.Weight
    bias = None

    def __init__(self, count: int, out_features: int, in_features: int, sources: tuple[str, ...] = ()) -> None:
        super().__init__(weight=Declared((count, out_features, in_features), "linear", sources))


class MixtureOfExperts(Part):
    """(n, E) -> (n, E): see `ops.moe`. `prefix` is the layer's, "blk.3.": names of separate experts are built from it."""

    def __init__(self, spec: FeedForwardSpec, embedding_length: int, prefix: str) -> None:
        assert spec.experts is not None
        experts: ExpertsSpec = spec.experts
        self.activation = spec.activation
        self.routing = ops.Routing(experts.used, experts.gating, True, experts.scale)
        self.ffn_gate_inp = Linear(embedding_length, experts.count)

        def sources(name: str) -> tuple[str, ...]:
            return tuple(f"{prefix}{name}.{expert}.weight" for expert in range(experts.count)) if experts.separate else ()

        self.ffn_gate_exps = Experts(experts.count, experts.length, embedding_length, sources("ffn_gate"))
        self.ffn_up_exps = Experts(experts.count, experts.length, embedding_length, sources("ffn_up"))
        self.ffn_down_exps = Experts(experts.count, embedding_length, experts.length, sources("ffn_down"))

    def matrices(self) -> dict[str, Linear | Experts]:
        """By their part in `ops.DecoderLayer`."""
        return {
            "router": self.ffn_gate_inp,
            "gate": self.ffn_gate_exps,
            "up": self.ffn_up_exps,
            "down": self.ffn_down_exps,
        }

    def __call__(self, x: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        experts = self.ffn_gate_exps.weight, self.ffn_up_exps.weight, self.ffn_down_exps.weight
        return ops.moe(x, self.ffn_gate_inp(x, adapters), experts, self.routing, self.activation)
