"""What one pooling engine after the other embeds: ``python embeddings_of_engines.py MODEL TOKENIZER ENGINES OUTPUT``.

ENGINES, JSON, are lists of [attention backend or null, prompts]; vLLM wants a tokenizer there for its own sake. OUTPUT
gets, for each engine and prompt, the vector that the last token's hidden states make.
"""

import json
import sys
from pathlib import Path

from vllm import LLM


def embeddings(model: str, tokenizer: str, backend: str | None, prompts: list[list[int]]) -> list[list[float]]:
    """All prompts at once, in chunks of a step each."""
    llm = LLM(
        model,
        runner="pooling",
        attention_backend=backend,
        tokenizer=tokenizer,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        max_num_batched_tokens=96,
        enable_chunked_prefill=True,
    )
    found = llm.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [output.outputs.embedding for output in found]


if __name__ == "__main__":
    model, tokenizer, engines, output = sys.argv[1:]
    Path(output).write_text(json.dumps([embeddings(model, tokenizer, *engine) for engine in json.loads(engines)]))
