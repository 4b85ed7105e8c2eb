"""gemma2: gemma with norms on both sides of each branch, every other layer windowed, capped scores and logits."""

from __future__ import annotations

import math

from ollamapy.models.decoder import Decoder, Traits

LAYERS_OF_27B = 46  # no key tells that the 27B scales by E / heads and not by key_length


class Gemma2(Decoder):
    traits = Traits(activation="gelu_tanh", post_norms=True, scale_embedding=True)

    def attention_scale(self, key_length: int) -> float:
        config = self.config
        if config.block_count == LAYERS_OF_27B:
            return 1.0 / math.sqrt(config.embedding_length / config.num_heads[0])
        return 1.0 / math.sqrt(key_length)
