"""llama: Llama 1 to 3, Mistral, Mixtral, SmolLM and many more.

Rope turns pairs (2i, 2i + 1): converters have permuted q and k for it. Llama 3.1's rope scaling comes as the tensor
`rope_freqs`. Layers with `ffn_gate_inp` are Mixtral's: softmax over all experts, the best k, weights renormalised.
"""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Llama(Decoder):
    traits = Traits(interleaved_rope=True)
