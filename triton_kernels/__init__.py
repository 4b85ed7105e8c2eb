"""Triton kernels, one file per family. Installed as `ollamapy.triton_kernels`; imported by `ollamapy.ops` alone."""
