"""llmir: a compiler layer between an LLM serving framework and its attention and KV-cache kernels."""

__version__ = "0.1.0"
