"""SGLang as a comparison drives it; imports SGLang, so only a worker process imports this module."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy
import sglang

from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Continuation
from llmir.compare.workloads import GeneratedPrefixes, Request
from llmir.errors import LlmirError

#: Most likely tokens kept a place: enough that the other side's choice is among them where the two differ.
_LOGPROBS = 5
_SETTINGS = (
    "attention_backend",
    "page_size",
    "max_total_num_tokens",
    "chunked_prefill_size",
    "max_prefill_tokens",
    "max_running_requests",
    "context_length",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "enable_torch_compile",
    "sampling_backend",
    "schedule_policy",
    "tp_size",
    "pp_size",
)


class SglangEngine:
    """``sglang.Engine``: tokenizer in this process, scheduler and detokenizer in processes of their own."""

    def __init__(self, model: str, arguments: dict[str, Any]):
        self._engine = sglang.Engine(model_path=model, **arguments)

    def vocabulary(self) -> list[int]:
        manager = self._engine.tokenizer_manager
        special = set(manager.tokenizer.all_special_ids) | set(manager.tokenizer.get_added_vocab().values())
        size = min(len(manager.tokenizer), manager.model_config.vocab_size)
        return [token for token in range(size) if token not in special]

    def encode(self, text: str) -> list[int]:
        return self._engine.tokenizer_manager.tokenizer.encode(text, add_special_tokens=False)

    def generate_requests(self, shape: GeneratedPrefixes, seed: int) -> list[Request]:
        """The data set ``generated-shared-prefix`` of ``sglang.bench_serving``, with its ``--tokenize-prompt``."""
        try:
            from sglang.benchmark.datasets.generated_shared_prefix import GeneratedSharedPrefixDataset
        except ModuleNotFoundError as error:
            raise LlmirError(
                f"SGLang's data sets need a package that is not installed; run: pip install {error.name}"
            ) from error

        random.seed(seed)  # as bench_serving does: the generator draws from the global sources
        numpy.random.seed(seed)
        rows = GeneratedSharedPrefixDataset(
            num_groups=shape.groups,
            prompts_per_group=shape.requests,
            system_prompt_len=shape.prefix_tokens,
            question_len=shape.own_tokens,
            output_len=shape.output_tokens,
            range_ratio=1.0,
            seed=seed,
            fast_prepare=False,
            # Rows with such keys are not kept on disk, where another model's of the same sizes might lie.
            send_routing_key=True,
            num_turns=1,
            ordered=False,
            input_ids=True,
        ).load(self._engine.tokenizer_manager.tokenizer)
        return [Request(row.prompt, row.output_len) for row in rows]

    def serve(self, requests: Sequence[Request]) -> list[RequestRecord]:
        """One stream a request, all on one event loop, as a client with many users has them."""
        return self._all([self._timed(request) for request in requests])

    def continue_greedily(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Continuation]:
        asked = {"return_logprob": True, "top_logprobs_num": _LOGPROBS}
        outputs = self._all([self._generate(prompt, output_tokens, **asked) for prompt in prompts])
        return [
            Continuation(
                output["output_ids"],
                [_place(*entries) for entries in zip(*_logprobs(output), strict=True)],
                output["meta_info"]["cached_tokens"],
            )
            for output in outputs
        ]

    def score(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """One text after another: the logits of a text's every token take tokens times vocabulary times 4 bytes."""
        scores = []
        for text in texts:
            (output,) = self._all([self._generate(text, 1, return_logprob=True, logprob_start_len=0)])
            # The first token has nothing before it, and so no log-probability.
            scores.append([logprob for logprob, _, _ in output["meta_info"]["input_token_logprobs"][1:]])
        return scores

    def forget_prefixes(self) -> None:
        if not self._engine.flush_cache().success:
            raise LlmirError("SGLang did not empty its prefix cache, so no run on it would be cold")

    def settings(self) -> dict[str, Any]:
        info = self._engine.get_server_info()
        return {
            **{name: info[name] for name in _SETTINGS},
            # The record keeps "auto"; the model's own configuration has what became of it.
            "dtype": str(self._engine.tokenizer_manager.model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": info["kv_cache_dtype"],
            "threads": int(os.environ["OMP_NUM_THREADS"]),
        }

    async def _timed(self, request: Request) -> RequestRecord:
        submitted = time.monotonic()
        times: list[float] = []
        output: dict[str, Any] = {}
        stream = await self._engine.async_generate(
            input_ids=request.prompt_token_ids, sampling_params=_greedy(request.max_tokens), stream=True
        )
        async for output in stream:
            now = time.monotonic()
            # A piece tells how many tokens there are by now: as a rule one more than the piece before.
            times += [now] * (output["meta_info"]["completion_tokens"] - len(times))
        cached = output["meta_info"]["cached_tokens"]
        return RequestRecord(len(request.prompt_token_ids), submitted, times, cached, output["output_ids"])

    def _generate(self, prompt: list[int], tokens: int, **more: Any) -> Coroutine[Any, Any, dict[str, Any]]:
        return self._engine.async_generate(input_ids=prompt, sampling_params=_greedy(tokens), **more)

    def _all(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*coroutines)

        # The engine's own loop: its tokenizer manager receives the scheduler's answers there.
        return self._engine.loop.run_until_complete(together())


def _greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}


def _logprobs(output: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """For each output token its own entry and those of the most likely, as (log-probability, token, text)."""
    return output["meta_info"]["output_token_logprobs"], output["meta_info"]["output_top_logprobs"]


def _place(chosen: tuple[float, int, Any], likely: Sequence[tuple[float, int, Any]]) -> dict[int, float]:
    return {token: logprob for logprob, token, _ in (*likely, chosen)}
