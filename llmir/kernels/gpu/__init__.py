"""Attention and KV-cache kernels for GPUs, in Triton."""
