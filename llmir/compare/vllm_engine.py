"""vLLM as a comparison drives it; imports vLLM, so only a worker process imports this module."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from vllm import LLM, SamplingParams, platforms
from vllm.inputs import TokensPrompt, tokens_input
from vllm.sampling_params import RequestOutputKind

from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Continuation
from llmir.compare.workloads import GeneratedPrefixes, Request
from llmir.errors import LlmirError

#: Most likely tokens kept a place: enough that the other side's choice is among them where the two differ.
_LOGPROBS = 5


class VllmEngine:
    """``vllm.LLM`` in its default shape: engine and worker in processes of their own."""

    def __init__(self, model: str, arguments: dict[str, Any]):
        self._llm = LLM(model, **arguments)
        self._submitted = 0

    def vocabulary(self) -> list[int]:
        tokenizer = self._llm.get_tokenizer()
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        size = min(len(tokenizer), self._llm.model_config.get_vocab_size())
        return [token for token in range(size) if token not in special]

    def encode(self, text: str) -> list[int]:
        return self._llm.get_tokenizer().encode(text, add_special_tokens=False)

    def generate_requests(self, shape: GeneratedPrefixes, seed: int) -> list[Request]:
        """The data set ``prefix_repetition`` of ``vllm bench``, its text as token ids."""
        from vllm.benchmarks.datasets import PrefixRepetitionRandomDataset  # imports much that only benchmarks need

        samples = PrefixRepetitionRandomDataset(random_seed=seed).sample(
            self._llm.get_tokenizer(),
            num_requests=shape.groups * shape.requests,
            prefix_len=shape.prefix_tokens,
            suffix_len=shape.own_tokens,
            num_prefixes=shape.groups,
            output_len=shape.output_tokens,
        )
        return [Request(self.encode(str(sample.prompt)), sample.expected_output_len) for sample in samples]

    def serve(self, requests: Sequence[Request]) -> list[RequestRecord]:
        """Drive the engine step by step, as ``LLM.generate`` does, but see each step's tokens.

        A step returns when the engine process has sent its tokens, so the times are a client's.
        """
        engine = self._llm.llm_engine
        records: dict[str, RequestRecord] = {}
        for request in requests:
            name = f"timed-{self._submitted}"
            self._submitted += 1
            parameters = SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=request.max_tokens, output_kind=RequestOutputKind.DELTA
            )
            records[name] = RequestRecord(len(request.prompt_token_ids), time.monotonic(), [], 0)
            engine.add_request(name, tokens_input(request.prompt_token_ids), parameters)
        while engine.has_unfinished_requests():
            outputs: list[Any] = engine.step()
            now = time.monotonic()
            for output in outputs:
                record = records[output.request_id]
                new = output.outputs[0].token_ids
                record.token_ids.extend(new)
                record.token_times.extend(now for _ in new)
                if output.finished:
                    records[output.request_id] = replace(record, cached_tokens=output.num_cached_tokens or 0)
        return list(records.values())

    def continue_greedily(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Continuation]:
        parameters = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_tokens, logprobs=_LOGPROBS)
        return [
            Continuation(
                list(output.outputs[0].token_ids),
                [{token: entry.logprob for token, entry in place.items()} for place in output.outputs[0].logprobs],
                output.num_cached_tokens or 0,
            )
            for output in self._generate(prompts, parameters)
        ]

    def score(self, texts: Sequence[list[int]]) -> list[list[float]]:
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        return [
            [place[token].logprob for token, place in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
            for text, output in zip(texts, self._generate(texts, parameters), strict=True)
        ]

    def forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise LlmirError("vLLM did not empty its prefix cache, so no run on it would be cold")

    def settings(self) -> dict[str, Any]:
        config = self._llm.llm_engine.vllm_config
        cache, scheduler, compilation = config.cache_config, config.scheduler_config, config.compilation_config
        backend = config.attention_config.backend
        return {
            "attention_backend": backend.name if backend is not None else "default",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": cache.block_size,
            "platform": zentorch_use(),
            "threads": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
            "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "enable_chunked_prefill": scheduler.enable_chunked_prefill,
            "max_model_len": config.model_config.max_model_len,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "compilation_mode": getattr(compilation.mode, "name", str(compilation.mode)),
            "enforce_eager": config.model_config.enforce_eager,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        }

    def _generate(self, prompts: Sequence[list[int]], parameters: SamplingParams) -> list[Any]:
        return self._llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)


def zentorch_use() -> str:
    """Whether vLLM multiplies by AMD's prepacked matrix products in this process, in words, and if not, why not."""
    installed = [dist for name in ("zentorch", "zentorch-weekly") for dist in metadata.distributions(name=name)]
    if not installed:
        return "zentorch not installed"
    name = f"zentorch {installed[0].version}"
    if platforms.current_platform.is_zen_cpu():
        # What vLLM asks, layer by layer, before it hands one over.
        has_products = hasattr(torch.ops.zentorch, "zentorch_linear_unary")
        return f"{name} in use" if has_products else f"{name} not in use: it has no products for linear layers"
    # vLLM asks for no less before it tries to load it.
    if not platforms._is_amd_zen_cpu():
        return f"{name} not in use: needs an AMD CPU with AVX512"
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError) as error:
        return f"{name} not in use: it does not load ({error})"
    return f"{name} not in use: vLLM chose {type(platforms.current_platform).__name__}"
