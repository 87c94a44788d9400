"""Decode attention at the head sizes that vLLM's own kernel has beside the usual ones: llmir's kernel against it.

python benchmarks/head_sizes.py --threads 1 --json head-sizes.json
"""

from attention_step import Case
from side_by_side import StreamingRead, main

#: Elements of keys and values of one head and request; requests are as many as make a step of some 130 MB in bfloat16.
TOKENS = 2048
CASES = tuple(
    Case(f"head{size}", 8, 2, size, requests=8192 // size // 2, context=TOKENS, new_tokens=1)
    for size in (32, 112, 160, 192, 224, 512)
)

if __name__ == "__main__":
    main(__doc__, CASES, StreamingRead)
