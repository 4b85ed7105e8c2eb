"""phi3: Phi 3, 3.5 and 4. Fused attn_qkv and fused gate and up; part of each head may turn; longrope factors.

The window, where the file has its key, holds on all layers.
"""

from __future__ import annotations

from ollamapy.models.decoder import Decoder, Traits


class Phi3(Decoder):
    traits = Traits()
