"""qwen2: Qwen 1.5, 2 and 2.5. Llama with biases on q, k and v, and rope on halves."""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Qwen2(Decoder):
    traits = Traits(qkv_bias=True)
