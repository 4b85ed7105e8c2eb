"""mistral3: Mistral Small 3.1 and later, Ministral 3, Devstral.

Llama with yarn, whose magnitude follows `yarn_log_multiplier`, and queries that grow beyond the original context by
1 + s ln(floor(position / length) + 1), in all layers.
"""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Mistral3(Decoder):
    traits = Traits(interleaved_rope=True)
