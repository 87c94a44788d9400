"""One engine's answers to everything the tests ask: ``python answer.py MODEL ARGUMENTS JOBS OUTPUT``.

A program of its own, because SGLang keeps what it was started with in globals. ARGUMENTS are the Engine's, as JSON;
JOBS are names of the functions below, with commas; OUTPUT gets a JSON object of what each returned.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

#: Prompts of these many tokens: at, before and after the ends of pages and chunks.
LENGTHS = (1, 2, 15, 17, 64, 65, 130, 300, 513)
CONCURRENT = 64
TEXT = Path(__file__).parents[2] / "LICENSE"


def windows(tokens: list[int], lengths: Any) -> list[list[int]]:
    """Pieces of the text, one after the other."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [tokens[start:end] for start, end in itertools.pairwise(ends)]


def ragged(engine: Any, tokens: list[int], lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    """Prompts of ragged lengths in one batch."""
    return engine.generate(
        input_ids=windows(tokens, lengths),
        sampling_params={"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=5,
    )


def ragged_again(engine: Any, tokens: list[int]) -> list[Any]:
    """The same prompts once more: what of them is in the prefix cache is not computed again."""
    return ragged(engine, tokens)


def short(engine: Any, tokens: list[int]) -> list[Any]:
    """The shorter ones alone, for engines that multiply by emulation."""
    return ragged(engine, tokens, LENGTHS[:7])


def concurrent(engine: Any, tokens: list[int]) -> list[Any]:
    """Many requests at once, which each begin a second page of 64 tokens while they answer."""
    lengths = [60 + number % 4 for number in range(CONCURRENT)]
    return engine.generate(
        input_ids=windows(tokens, lengths),
        sampling_params={"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=5,
    )


def embeddings(engine: Any, tokens: list[int]) -> list[Any]:
    """What an engine of an embedding model makes of texts."""
    text = TEXT.read_text()
    return [made["embedding"] for made in engine.encode([text[:length] for length in (5, 400, 1500)])]


def scores(engine: Any, tokens: list[int]) -> list[Any]:
    """Log-probabilities of given texts, token by token."""
    return engine.generate(
        input_ids=windows(tokens[1000:], (300, 200, 100)),
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
    )


def main() -> None:
    import sglang
    from transformers import AutoTokenizer

    model, arguments, jobs, output = sys.argv[1:]
    tokens = AutoTokenizer.from_pretrained(model)(2 * TEXT.read_text())["input_ids"]
    engine = sglang.Engine(model_path=model, device="cpu", log_level="info", **json.loads(arguments))
    answers = {job: globals()[job](engine, tokens) for job in jobs.split(",")}
    info = engine.get_server_info()
    engine.shutdown()
    answers["server"] = {name: info[name] for name in ("attention_backend", "page_size")}
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
