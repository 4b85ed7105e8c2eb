"""Model architectures: one small file each. This table is the only list of them; importing it loads no torch."""

from __future__ import annotations

ARCHITECTURES: dict[str, str] = {
    "gemma": "gemma.Gemma",
    "gemma2": "gemma2.Gemma2",
    "gemma3": "gemma3.Gemma3",
    "llama": "llama.Llama",
    "mistral3": "mistral3.Mistral3",
    "phi3": "phi3.Phi3",
    "qwen2": "qwen2.Qwen2",
    "qwen3": "qwen3.Qwen3",
    "qwen3moe": "qwen3moe.Qwen3Moe",
}
"""`general.architecture` of a GGUF file -> module and class under `ollamapy.models`."""
