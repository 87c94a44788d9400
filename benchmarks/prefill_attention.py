"""Prefill attention, a prompt of 2048 tokens at once: llmir's kernel against vLLM's, in one process.

The ceiling is a bf16 matrix product: prefill attention is two of them with a softmax between.

    python benchmarks/prefill_attention.py --json prefill.json
"""

from attention_step import Case
from side_by_side import MatrixProduct, main

CASES = (
    Case("smollm2", num_heads=9, num_kv_heads=3, head_size=64, requests=1, context=2048, new_tokens=2048),
    Case("llama8b", num_heads=32, num_kv_heads=8, head_size=128, requests=1, context=2048, new_tokens=2048),
)

if __name__ == "__main__":
    main(__doc__, CASES, MatrixProduct)
