"""One engine's greedy answers to prompts of tokens: ``python answer_tokens.py MODEL BACKEND PROMPTS OUTPUT``.

PROMPTS, JSON, are lists of token ids; OUTPUT gets, for each, the tokens of the answer and their log-probabilities.
"""

import json
import sys
from pathlib import Path

SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def main() -> None:
    import sglang

    model, backend, prompts, output = sys.argv[1:]
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        attention_backend=backend,
        dtype="float32",
        skip_tokenizer_init=True,
        max_total_tokens=2048,
    )
    answers = engine.generate(input_ids=json.loads(prompts), sampling_params=SAMPLING, return_logprob=True)
    engine.shutdown()
    chosen = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    found = [{"tokens": [t for _, t, _ in one], "logprobs": [p for p, _, _ in one]} for one in chosen]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
