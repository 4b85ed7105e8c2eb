"""gemma: embeddings scaled by sqrt(E), GELU (tanh) gates. The 1 of its norms is in the file's weights."""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Gemma(Decoder):
    traits = Traits(activation="gelu_tanh", scale_embedding=True)
