"""ollamapy: serves GGUF models through Ollama's, OpenAI's and Anthropic's APIs, on PyTorch."""

import os.path

__version__ = "0.1.0"

if not os.path.isdir(os.path.join(__path__[0], "triton_kernels")):
    __path__.append(os.path.dirname(__path__[0]))  # a checkout that is not installed: triton_kernels/ lies beside the package
