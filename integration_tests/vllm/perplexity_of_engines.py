"""The perplexity of English to one engine after the other: ``python perplexity_of_engines.py MODEL BACKENDS OUTPUT``.

BACKENDS, JSON, are attention backends or null; OUTPUT gets a number for each.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from llmir.compare.quality import english_text, perplexity, pieces

#: Of the text, and tokens of each: more than a window of Gemma 3's.
WINDOWS, TOKENS = 4, 800


def measure(model: str, backend: str | None) -> float:
    """Over all windows of the text, each on its own."""
    llm = LLM(
        model,
        attention_backend=backend,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=1024,
        max_num_batched_tokens=512,
    )
    tokenizer = llm.get_tokenizer()
    start, tokens = tokenizer.encode(""), tokenizer.encode(english_text(), add_special_tokens=False)
    windows = [{"prompt_token_ids": start + piece} for piece in pieces(tokens, WINDOWS, TOKENS)]
    done = llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    asked = [zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) for output in done]
    return perplexity([[step[token].logprob for token, step in window if step] for window in asked])


if __name__ == "__main__":
    model, backends, output = sys.argv[1:]
    Path(output).write_text(json.dumps([measure(model, backend) for backend in json.loads(backends)]))
