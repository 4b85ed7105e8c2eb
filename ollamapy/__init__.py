"""ollamapy: serves GGUF models through Ollama's, OpenAI's and Anthropic's APIs, on PyTorch."""

__version__ = "0.1.0"
