"""qwen3: each head of q and k is normalised before rope; no biases; key_length is not embedding_length / heads."""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Qwen3(Decoder):
    traits = Traits(qk_norm=True)
