"""qwen3moe: qwen3 with experts: softmax over all, the best k, weights renormalised."""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Qwen3Moe(Decoder):
    traits = Traits(qk_norm=True)
