"""One side of the zoo: an engine of a framework in this process, and what it answers to the zoo's requests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweep_architectures import how_imported
from zoo_models import VOCABULARY, draw_weights

#: Tokens of the prompts that are asked together. With ``STEP_TOKENS`` in a step, the long ones are prefilled in
#: chunks, beside the decode steps of the short ones.
LENGTHS = (5, 40, 150, 230)
STEP_TOKENS = 96
#: A prompt that was asked before, and how many tokens another goes on for beyond one: both begin in the cache.
AGAIN, LONGER = 2, 40
TOKENS = 8
CONTEXT = 512
CACHE_TOKENS = 4096
CACHE_BYTES = 1 << 26
#: Of the memory that is free, how much SGLang may use: the cache, which is so small, and a tower need not leave much.
MEMORY_FRACTION = 0.97


@dataclass(frozen=True)
class Answer:
    """What one prompt was answered with."""

    tokens: list[int]
    logprobs: list[float]
    """Of ``tokens``, in nats."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of the prompt's tokens after the first, where they were asked for."""


#: Prompts and whether their own log-probabilities are wanted, to answers; and how the cache is emptied.
Generate = Callable[[list[list[int]], bool], list[Answer]]
Serving = tuple[Generate, Callable[[], None]]


def prompts() -> list[list[int]]:
    """One for each of ``LENGTHS``, all different, and the one that goes on."""
    drawn = random.Random(0)
    made = [[drawn.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    return [*made, made[-1] + [drawn.randrange(3, VOCABULARY) for _ in range(LONGER)]]


def answers(framework: str, model: str, plan: str | None, started: str) -> list[Answer]:
    """All answers of one engine, with llmir's attention where there is a ``plan``; touches ``started`` when it serves.

    First together, then from the cache, then each prompt alone with an empty cache.
    """
    os.environ["LLMIR_PLAN"] = plan or ""
    generate, empty = (vllm_engine if framework == "vllm" else sglang_engine)(model, plan is not None)
    Path(started).touch()
    *first, longer = prompts()
    found = generate(first, True)
    found += generate([first[AGAIN]], False) + generate([longer], False)
    empty()
    for prompt, of_prompts in [*((prompt, True) for prompt in first), (first[AGAIN], False), (longer, False)]:
        found += generate([prompt], of_prompts)
        empty()
    return found


def vllm_engine(model: str, llmir: bool) -> Serving:
    """vLLM in this process, weights drawn by the zoo."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader("zoo")
    class Loader(DummyModelLoader):
        def load_weights(self, model: Any, model_config: Any) -> None:
            draw_weights(model)

    llm = LLM(
        model,
        load_format="zoo",
        attention_backend="LLMIR" if llmir else None,
        kv_cache_memory_bytes=CACHE_BYTES,
        max_num_batched_tokens=STEP_TOKENS,
        **ENGINE_ARGUMENTS,
    )

    def generate(asked: list[list[int]], of_prompts: bool) -> list[Answer]:
        parameters = SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            logprobs=0,
            prompt_logprobs=0 if of_prompts else None,
            ignore_eos=True,
            detokenize=False,
        )
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], parameters, use_tqdm=False)
        return [_of_vllm(output) for output in done]

    return generate, llm.reset_prefix_cache


#: What decides a plan, in vLLM's words.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": True,
}


def _of_vllm(output: Any) -> Answer:
    answer = output.outputs[0]
    steps = zip(answer.logprobs, answer.token_ids, strict=True)
    asked = zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
    return Answer(
        list(answer.token_ids),
        [step[token].logprob for step, token in steps],
        [step[token].logprob for step, token in asked if step],
    )


def sglang_engine(model: str, llmir: bool) -> Serving:
    """SGLang, its scheduler in a process of its own, weights drawn by the zoo."""
    import multiprocessing

    from sglang.srt.entrypoints.engine import Engine

    # Forked from this process, SGLang's own have imported everything already; SGLang would spawn them.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]

    class ZooEngine(Engine):
        run_scheduler_process_func = staticmethod(sglang_scheduler)

    engine = ZooEngine(
        model_path=model,
        load_format="dummy",
        device="cpu",
        attention_backend="llmir" if llmir else "torch_native",
        dtype="float32",
        skip_tokenizer_init=True,
        context_length=CONTEXT,
        max_total_tokens=CACHE_TOKENS,
        chunked_prefill_size=STEP_TOKENS,
        max_running_requests=8,
        mem_fraction_static=MEMORY_FRACTION,
        enable_mixed_chunk=True,
    )
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}

    def generate(asked: list[list[int]], of_prompts: bool) -> list[Answer]:
        done = engine.generate(
            input_ids=asked,
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=0 if of_prompts else -1,
        )
        return [_of_sglang(one["meta_info"]) for one in done]

    return generate, lambda: engine.flush_cache() and None


def sglang_scheduler(*arguments: Any, **named: Any) -> Any:
    """SGLang's scheduler process, with the zoo's weights in place of SGLang's, which attention takes the mean of."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_loader import loader

    loader.initialize_dummy_weights = draw_weights
    return run_scheduler_process(*arguments, **named)


def _of_sglang(meta: dict[str, Any]) -> Answer:
    chosen, asked = meta["output_token_logprobs"], meta.get("input_token_logprobs") or []
    return Answer(
        [token for _, token, _ in chosen],
        [logprob for logprob, _, _ in chosen],
        [logprob for logprob, _, _ in asked if logprob is not None],
    )


def planned(framework: str, model: str, plan: str) -> tuple[str, dict[str, int], str]:
    """Write the plan of ``model`` to the file ``plan``; what :func:`how_imported` says.

    Raises what the importer and the compiler raise.
    """
    import logging

    from llmir.frontends.common.options import Options
    from llmir.frontends.common.planning import compile_module

    if framework == "vllm":
        from llmir.frontends.vllm.offline import import_model

        module = import_model(model, **ENGINE_ARGUMENTS)
    else:
        from llmir.frontends.sglang.offline import import_model as import_sglang

        module = import_sglang(model, skip_tokenizer_init=True, dtype="float32", context_length=CONTEXT)
    found = how_imported(module)
    made = compile_module(module, Options(), logging.getLogger("zoo"))
    made.write(Path(plan))
    return found
