from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from llmir.compare.frameworks import FRAMEWORKS
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ReportFiles
from llmir.compare.workloads import WORKLOADS
from llmir.errors import LlmirError

Options = Callable[..., CompareOptions]


def test_the_llmir_side_has_only_the_flag_on_top(options: Options):
    made = options(engine={"enforce_eager": True})
    assert made.arguments("llmir") == made.arguments("baseline") | {"attention_backend": "LLMIR"}


def test_sglang_keeps_its_own_settings_and_page_size_to_its_own_side(options: Options):
    made = options(framework="sglang")
    own = made.arguments("baseline")
    assert own.items() >= FRAMEWORKS["sglang"].baseline.items()
    shared = {name: value for name, value in own.items() if name not in FRAMEWORKS["sglang"].baseline}
    assert made.arguments("llmir") == shared | {"attention_backend": "llmir"}


def test_sglang_has_room_for_every_request_of_a_workload_twice(options: Options):
    made = options(framework="sglang", workloads=("long",)).arguments("baseline")
    assert made["max_total_tokens"] == 2 * 16 * made["context_length"]


@pytest.mark.parametrize("name", [name for name, workload in WORKLOADS.items() if workload.framework is None])
def test_sglang_has_room_for_all_that_a_workload_shares_and_does_not(options: Options, name: str):
    room = options(framework="sglang", workloads=(name,), quality=False).arguments("baseline")["max_total_tokens"]
    requests = WORKLOADS[name].requests(range(40000), seed=0, repeat=0)
    prompts = sorted(request.prompt_token_ids for request in requests)
    shared = sum(
        sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], zip(one, other, strict=False)))
        for one, other in pairwise(prompts)
    )
    assert sum(request.all_tokens() for request in requests) - shared <= room / 2


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_workloads_and_pairs_are_the_frameworks_own_unless_given(options: Options, framework: str):
    own = options(framework=framework, workloads=None)
    assert (tuple(own.runs()), own.pair_count()) == (FRAMEWORKS[framework].workloads, FRAMEWORKS[framework].pairs)
    given = options(framework=framework, workloads=("smoke",), pairs=7)
    assert (tuple(given.runs()), given.pair_count()) == (("smoke",), 7)


def test_the_cache_memory_is_explicit_on_both_sides(options: Options):
    assert options(kv_cache_bytes=1 << 20).arguments("baseline")["kv_cache_memory_bytes"] == 1 << 20


def test_engine_arguments_of_the_user_win(options: Options):
    assert options(engine={"max_model_len": 512}).arguments("baseline")["max_model_len"] == 512


def test_the_model_length_covers_the_longest_request(options: Options):
    assert options(workloads=("long",)).arguments("baseline")["max_model_len"] == 4096


@pytest.mark.parametrize(("framework", "name"), [("vllm", "prefix_repetition"), ("sglang", "generated-shared-prefix")])
def test_a_generator_runs_in_its_own_framework_with_room_for_text_that_is_longer_than_asked(
    options: Options, framework: str, name: str
):
    made = options(framework=framework, workloads=(name,))
    length = made.arguments("baseline")["max_model_len" if framework == "vllm" else "context_length"]
    assert length >= WORKLOADS[name].longest() + 128


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_both_sides_have_the_dtype(options: Options, framework: str):
    made = options(framework=framework, dtype="float16")
    assert {made.arguments(side)["dtype"] for side in ("baseline", "llmir")} == {"float16"}


def test_what_is_left_out_changes_no_engine_argument(options: Options):
    made = options(workloads=("short", "long"), left_out=("long",))
    assert list(made.runs()) == ["short"]
    assert made.arguments("baseline") == options(workloads=("short", "long")).arguments("baseline")


def test_repeats_come_from_the_workload_unless_given(options: Options):
    assert options(workloads=("short", "chat")).runs() == {"short": 2, "chat": 1}
    assert options(workloads=("short", "chat"), repeats=3).runs() == {"short": 3, "chat": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"framework": "tgi"}, "cannot compare 'tgi'"),
        ({"dtype": "int8"}, "no dtype 'int8'; choose from bfloat16, float16, float32"),
        ({"workloads": ("fast",)}, "no workload 'fast'"),
        (
            {"framework": "sglang", "workloads": ("groups", "prefix_repetition")},
            "workload prefix_repetition is made by vLLM's own generator, .* run it with: llmir compare vllm",
        ),
        (
            {"workloads": ("generated-shared-prefix",)},
            "workload generated-shared-prefix is made by SGLang's own .* vLLM does not have",
        ),
        ({"workloads": (), "quality": False}, "nothing to compare"),
        ({"pairs": 0}, "at least one pair"),
        ({"repeats": 0}, "at least one pair and one repeat"),
    ],
)
def test_what_cannot_work_is_refused(options: Options, fields: dict, message: str):
    with pytest.raises(LlmirError, match=message):
        options(**fields)


def test_a_missing_model_is_refused(options: Options, tmp_path: Path):
    with pytest.raises(LlmirError, match="there is no model"):
        options(model=str(tmp_path / "nothing"))


def test_a_folder_without_a_model_is_refused(options: Options, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlmirError, match=r"no config\.json"):
        options(model=str(tmp_path / "empty"))


def test_a_hub_name_is_left_to_the_framework(options: Options):
    assert options(model="HuggingFaceTB/SmolLM2-135M-Instruct").model


def test_a_model_too_short_for_the_workload_is_refused(options: Options, model: Path):
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    with pytest.raises(LlmirError, match=r"workload long needs 3136 tokens, .* takes 2048"):
        options(workloads=("short", "long"))


def test_a_damaged_model_configuration_is_an_error(options: Options, model: Path):
    (model / "config.json").write_text("{")
    with pytest.raises(LlmirError, match="cannot be read"):
        options()


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(model: Path):
    with pytest.raises(LlmirError, match="cannot write"):
        ReportFiles(json=model / "config.json" / "report.json")


def test_an_unknown_chart_format_is_refused_before_anything_runs(tmp_path: Path):
    with pytest.raises(LlmirError, match="no picture format"):
        ReportFiles(chart=tmp_path / "chart.doc")
