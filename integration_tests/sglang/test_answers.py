"""Real SGLang answering with llmir's kernels as with its own, for each page size and way to batch.

In float32 answers are exact, so page sizes and ways to batch are tried in it. Log-probabilities in bfloat16 are some
hundredths of a nat off, whoever computes them. How many is known from SGLang's own kernels in bfloat16 and in float32:
llmir's may not be further off. A processor without AVX512 multiplies float16 and bfloat16 by emulation, which takes
minutes an engine: few have them.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from engines import Answers, ask, largest_gap, make_plan_here, mean_error, one_cpu_a_rank
from safetensors.torch import load_file, save_file

#: Tokens of KV cache, where an engine does not say otherwise.
ROOM = 16384
EXACT = {"dtype": "float32"}
LLMIR: dict[str, dict[str, Any]] = {
    "bfloat16": {"page_size": 32},
    "float16": {"dtype": "float16"},
    "page 1": EXACT | {"page_size": 1},
    "page 16, chunked prefill": EXACT | {"page_size": 16, "chunked_prefill_size": 64},
    "page 32, mixed batches": EXACT | {"page_size": 32, "chunked_prefill_size": 128, "enable_mixed_chunk": True},
    "page 64, too little room": EXACT | {"page_size": 64, "max_total_tokens": 2048, "schedule_conservativeness": 0.01},
    "page 128": EXACT | {"page_size": 128},
    "two ranks": EXACT | {"tp_size": 2, "page_size": 16},
    "two stages": EXACT | {"pp_size": 2, "page_size": 32},
}
#: Engines whose kernels run on several threads; on a busy machine those wait for one another, so the others have one.
SEVERAL_THREADS = "page 16, chunked prefill"
SGLANG: dict[str, dict[str, Any]] = {"reference": {}, "exact": EXACT}
FLOAT32 = [name for name, arguments in LLMIR.items() if arguments.get("dtype") == "float32"]
#: Nats by which a bfloat16 answer of one token may differ.
NOISE = 0.6
#: Nats by which a float32 answer of one token, or the likelihood of a text's, may.
EXACT_NOISE = 2e-3
#: Nats by which the mean over all tokens of a text may: it is the logarithm of the perplexities' ratio.
MEAN_NOISE = 0.02
ALL_JOBS = "ragged,ragged_again,concurrent,scores"
#: Of engines that multiply by emulation; and of SGLang's own, whose kernels compute every cached token's query again.
FEW_JOBS, EXACT_JOBS = "short,scores", "ragged,short,concurrent,scores"

Answered = Callable[[str], Answers]


@pytest.fixture(scope="module")
def untied(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with its output weights stored apart: SGLang's Llama has no pipeline stages with tied ones."""
    folder = tmp_path_factory.mktemp("untied")
    for path in Path(smollm2).iterdir():
        (folder / path.name).symlink_to(path)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def answered(smollm2: str, untied: str, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """``answered("page 1")``: what the engine called so answered; each is started once."""
    cache = tmp_path_factory.mktemp("cache")

    def start(name: str) -> Answers:
        own = name in LLMIR
        arguments = {"attention_backend": "llmir" if own else "torch_native", "max_total_tokens": ROOM}
        arguments |= (LLMIR if own else SGLANG)[name]
        model = untied if "pp_size" in arguments else smollm2
        if own:
            make_plan_here(model, arguments)
        jobs = ALL_JOBS if name in FLOAT32 else EXACT_JOBS if name == "exact" else FEW_JOBS
        ranks = arguments.get("tp_size", 1) * arguments.get("pp_size", 1)
        threads = "all" if name == SEVERAL_THREADS else one_cpu_a_rank(ranks)
        folder = tmp_path_factory.mktemp("engine")
        return ask(model, jobs, arguments, folder, LLMIR_CACHE=str(cache), SGLANG_CPU_OMP_THREADS_BIND=threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMIR_CACHE", str(cache))
        yield functools.cache(start)


@pytest.mark.parametrize("name", LLMIR)
def test_llmir_serves_every_layer_with_the_users_pages(answered: Answered, name: str) -> None:
    answers = answered(name)
    layers = re.findall(r"attention_\w+ serves (\d+) layers", answers.log)
    assert sum(map(int, layers)) == 30 * LLMIR[name].get("tp_size", 1)
    assert answers.jobs["server"]["attention_backend"] == "llmir"
    assert answers.jobs["server"]["page_size"] == LLMIR[name].get("page_size", answers.jobs["server"]["page_size"])


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.parametrize("job", ["ragged", "concurrent"])
def test_float32_answers_are_sglangs(answered: Answered, name: str, job: str) -> None:
    assert largest_gap(answered(name), answered("exact"), job) < EXACT_NOISE


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_texts_are_as_likely(answered: Answered, name: str) -> None:
    ours, exact = answered(name), answered("exact")
    assert max(abs(a - b) for a, b in zip(ours.scores(), exact.scores(), strict=True)) < EXACT_NOISE
    assert [answer["text"] for answer in ours.jobs["ragged"]] == [answer["text"] for answer in exact.jobs["ragged"]]


def test_bfloat16_answers_are_as_near_to_the_exact_ones_as_sglangs(answered: Answered) -> None:
    ours, theirs, exact = (answered(engine).scores() for engine in ("bfloat16", "reference", "exact"))
    assert mean_error(ours, exact) < 1.25 * mean_error(theirs, exact)
    assert abs(fmean(ours) - fmean(exact)) < MEAN_NOISE
    assert largest_gap(answered("bfloat16"), answered("reference"), "short") < NOISE


@pytest.mark.parametrize("name", FLOAT32)
def test_cached_prefixes_answer_as_computed_ones(answered: Answered, name: str) -> None:
    answers = answered(name)
    page_size = answers.jobs["server"]["page_size"]
    lengths = answers.meta("ragged_again", "prompt_tokens")
    whole_pages = [(length - 1) // page_size * page_size for length in lengths]
    assert answers.meta("ragged_again", "cached_tokens") == whole_pages
    assert largest_gap(answers, Answers({"ragged": answers.jobs["ragged_again"]}, ""), "ragged") < EXACT_NOISE


def test_float16_is_closer_to_the_exact_answers_than_bfloat16(answered: Answered) -> None:
    exact = answered("exact").scores()
    error = mean_error(answered("float16").scores(), exact)
    assert error < 0.5 * mean_error(answered("reference").scores(), exact)
    assert largest_gap(answered("float16"), answered("exact"), "short") < NOISE / 2


def test_requests_are_retracted_and_come_back(answered: Answered) -> None:
    answers = answered("page 64, too little room")
    assert sum(answers.meta("concurrent", "num_retractions")) > 0
    assert "Retract requests" in answers.log


def test_long_prompts_come_in_chunks(answered: Answered) -> None:
    batches = re.findall(r"Prefill batch.*?#new-token: (\d+)", answered("page 16, chunked prefill").log)
    assert max(map(int, batches)) <= 64


def test_prefill_and_decode_share_batches(answered: Answered) -> None:
    log = answered("page 32, mixed batches").log
    running = re.findall(r"Prefill batch.*?#running-req: (\d+)", log)
    assert any(int(count) > 0 for count in running)


def test_each_rank_has_its_share_of_the_heads(answered: Answered) -> None:
    assert answered("two ranks").log.count("attention_6x2x64_f32_block16 serves 30 layers") == 2


def test_each_stage_has_its_share_of_the_layers(answered: Answered) -> None:
    assert answered("two stages").log.count("attention_9x3x64_f32_block32 serves 15 layers") == 2
