"""What one vLLM engine after the other answers: ``python answers_of_engines.py JOBS OUTPUT``.

JOBS, JSON, are lists of [model folder, attention backend or null, prompts] and maybe a dtype in place of float32; the
engines of all of them are made in this one process. OUTPUT gets, for each job and prompt, the greedy tokens and their
log-probabilities.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

TOKENS = 8


def answers(
    model: str, backend: str | None, prompts: list[list[int]], dtype: str = "float32"
) -> list[dict[str, list[float]]]:
    """The prompts one after the other, so that the second finds its beginning in the cache."""
    llm = LLM(
        model,
        attention_backend=backend,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        enable_prefix_caching=True,
    )
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    found = []
    for prompt in prompts:
        answer = llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)[0]
        output = answer.outputs[0]
        chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        found.append({"tokens": list(output.token_ids), "logprobs": chosen, "cached": answer.num_cached_tokens})
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    jobs, output = sys.argv[1:]
    Path(output).write_text(json.dumps([answers(*job) for job in json.loads(jobs)]))
