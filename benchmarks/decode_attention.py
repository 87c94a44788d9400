"""Decode attention, one new token a request: llmir's kernel against vLLM's, in one process.

The ceiling is a streaming read: a decode step reads every key and value once.

    python benchmarks/decode_attention.py --json decode.json
"""

from attention_step import Case
from side_by_side import StreamingRead, main

CASES = (
    Case("smollm2", num_heads=9, num_kv_heads=3, head_size=64, requests=32, context=2048, new_tokens=1),
    Case("llama8b", num_heads=32, num_kv_heads=8, head_size=128, requests=8, context=4096, new_tokens=1),
)

if __name__ == "__main__":
    main(__doc__, CASES, StreamingRead)
