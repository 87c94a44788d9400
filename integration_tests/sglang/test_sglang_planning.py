"""Plans on SGLang's server arguments: made in a child process, kept on disk, the same at every start."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import no_child
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
from tiny_models import FAMILIES, LAYERS, WriteModel

from llmir import compiler
from llmir.errors import LlmirError, PlanError, UnsupportedLayerError
from llmir.frontends.common import planning as common
from llmir.frontends.common.options import Options
from llmir.frontends.sglang import support
from llmir.frontends.sglang.importer import configure, import_module
from llmir.frontends.sglang.planning import plan_of
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.workload import DEFAULT


def resolve(folder: str, **fields: Any) -> ServerArgs:
    """Server arguments that ask for llmir, resolved as SGLang does before it starts processes."""
    asked = {"device": "cpu", "skip_tokenizer_init": True, "attention_backend": "llmir", **fields}
    server_args = ServerArgs(model_path=folder, **asked)
    server_args.resolve_once()
    return server_args


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the tiny Llama with pages of 64 tokens, compiled in this process."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **FAMILIES["llama"]}))
    module = import_module(configure(model_path=str(folder), skip_tokenizer_init=True, page_size=64))
    options = compiler.Options(calibrate=False, cache=tmp_path_factory.mktemp("cache"))
    made = compiler.compile(module, Target.detect(), DEFAULT, options)
    return Plan.loads(made.dumps())  # as it comes from a child or a file: lists where it had tuples


@pytest.fixture
def made(plan: Plan, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Lets the child process answer with ``plan`` at once; the list has an entry for each time it is asked."""
    asked: list[Options] = []

    def child(module: str, payload: tuple[dict[str, Any], Options]) -> Plan:
        asked.append(payload[1])
        return plan

    monkeypatch.setattr(common, "plan_in_child", child)
    return asked


def test_a_child_makes_the_plan_and_the_next_start_reads_it(
    write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model("llama")
    first = resolve(folder)
    plan = plan_of(first)
    assert resolving_view(first).page_size == plan.block_size
    assert [layer for kernel in plan.kernels for layer in kernel.layers] == [
        f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)
    ]
    monkeypatch.setattr(common.subprocess, "run", no_child)
    assert plan_of(resolve(folder)) == plan


def test_an_error_of_the_child_is_the_same_error_here(write_model: WriteModel, cache: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="head size is 42") as refusal:
        resolve(write_model("llama", head_dim=42))
    assert refusal.value.layer == "model.layers.0.self_attn.attn"


def test_a_child_that_dies_is_an_error(write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.sys, "executable", "/bin/false")
    with pytest.raises(common.PlanningError, match="status 1"):
        resolve(write_model("llama"))


def test_the_plan_goes_with_the_arguments_into_other_processes(write_model: WriteModel, made: list[Options]) -> None:
    server_args = resolve(write_model("llama"))
    assert plan_of(pickle.loads(pickle.dumps(server_args))) == plan_of(server_args)


def test_arguments_without_a_plan_say_how_they_came_about() -> None:
    with pytest.raises(PlanError, match="SGLANG_PLUGINS"):
        plan_of(ServerArgs(model_path="m"))


def test_the_users_page_size_wins(write_model: WriteModel, made: list[Options], plan: Plan) -> None:
    assert resolving_view(resolve(write_model("llama"), page_size=64)).page_size == 64
    [decision] = [d for d in plan.decisions if d.subject == "KV cache"]
    assert "set by the user" in decision.reason
    with pytest.raises(PlanError, match="64 tokens, and --page-size says 128"):
        resolve(write_model("llama"), page_size=128)


def test_the_plan_sets_the_page_size(write_model: WriteModel, made: list[Options]) -> None:
    assert resolving_view(resolve(write_model("llama"))).page_size == 64


@pytest.mark.parametrize(
    ("chunk", "sizes"),
    [(100, [20, 25, 50, 100]), (96, [16, 32]), (24, [24]), (8, [8]), (1021, [1]), (-1, [16, 32, 64, 128, 256, 512])],
)
def test_pages_divide_the_prefill_chunk(chunk: int, sizes: list[int]) -> None:
    args = SimpleNamespace(page_size=None, chunked_prefill_size=chunk, device="cpu")
    assert support.allowed_page_sizes(args, SimpleNamespace(context_len=4096)) == sizes


def test_a_prefill_chunk_that_16_does_not_divide_is_served(write_model: WriteModel, cache: Path) -> None:
    server_args = resolve(write_model("llama"), chunked_prefill_size=100)
    assert 100 % resolving_view(server_args).page_size == 0
    assert plan_of(server_args).block_size == resolving_view(server_args).page_size


def test_no_step_is_captured_in_a_graph(write_model: WriteModel, made: list[Options]) -> None:
    graphs = resolving_view(resolve(write_model("llama"))).cuda_graph_config
    assert (graphs.prefill.backend, graphs.decode.backend) == ("disabled", "disabled")


def test_options_come_from_the_environment(
    write_model: WriteModel, made: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMIR_WORKLOAD", "chat")
    resolve(write_model("llama"))
    assert made == [Options(workload="chat")]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("LLMIR_WORKLAOD", "did you mean 'LLMIR_WORKLOAD'"), ("LLMIR_PAGESIZE", "no option 'LLMIR_PAGESIZE'")],
)
def test_unknown_variables_are_refused(
    write_model: WriteModel, made: list[Options], monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    monkeypatch.setenv(variable, "64")
    with pytest.raises(LlmirError, match=reason):
        resolve(write_model("llama"))


def test_each_fact_of_the_configuration_is_a_plan_of_its_own(write_model: WriteModel, made: list[Options]) -> None:
    llama = write_model("llama")
    base = {"json_model_override_args": '{"rope_theta": 5.0}'}
    for fields in ({}, base, {"dtype": "float32"}, {"page_size": 64}, {"context_length": 256}, {"tp_size": 2}):
        resolve(llama, **fields)
    assert len(made) == 6
    resolve(llama, max_total_tokens=4096, max_running_requests=7, pp_size=2)
    assert len(made) == 6, "and others are none"


def test_what_decides_which_classes_are_built_is_a_plan_of_its_own(
    write_model: WriteModel, made: list[Options]
) -> None:
    llama = write_model("llama")
    for fields in ({}, {"model_impl": "transformers"}, {"trust_remote_code": True}, {"enable_fp32_lm_head": True}):
        resolve(llama, **fields)
    assert len(made) == 4
    (Path(llama) / "modeling_own.py").write_text("class Own: ...")
    resolve(llama)
    assert len(made) == 5
    resolve(llama, port=12345, log_level="info")
    assert len(made) == 5, "and others are none"


class TestPlanFiles:
    @pytest.fixture(autouse=True)
    def no_compilation(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(common, "plan_in_child", no_child)

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LLMIR_PLAN", str(tmp_path / "plan.json"))
        return tmp_path / "plan.json"

    def test_one_is_served_as_it_is(self, write_model: WriteModel, plan: Plan, file: Path) -> None:
        folder = write_model("llama")
        replace(plan, model=folder).write(file)
        server_args = resolve(folder)
        assert resolving_view(server_args).page_size == 64
        assert plan_of(server_args).kernels == plan.kernels

    def test_one_for_other_pages_is_refused(self, write_model: WriteModel, plan: Plan, file: Path) -> None:
        folder = write_model("llama")
        replace(plan, model=folder).write(file)
        with pytest.raises(PlanError, match="64 tokens, and --page-size says 32"):
            resolve(folder, page_size=32)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"model": "another"}, "made for model 'another'"),
            ({"world_size": 2}, "made for tensor-parallel size 2"),
            ({"framework_version": "0.1"}, "made for framework 'sglang 0.1'"),
            ({"framework": "vllm"}, "made for framework 'vllm"),
            ({"target_fingerprint": f"riscv64-{Target.detect().isa}"}, "made for a machine riscv64"),
        ],
    )
    def test_one_for_something_else_is_refused(
        self, write_model: WriteModel, plan: Plan, file: Path, change: dict[str, Any], reason: str
    ) -> None:
        folder = write_model("llama")
        replace(plan, **{"model": folder, **change}).write(file)
        with pytest.raises(PlanError, match=reason):
            resolve(folder)

    @pytest.mark.parametrize("content", [None, "", "{", '{"format": 99}', "[]"])
    def test_an_unreadable_one_is_refused(self, write_model: WriteModel, file: Path, content: str | None) -> None:
        if content is not None:
            file.write_text(content)
        with pytest.raises(PlanError):
            resolve(write_model("llama"))


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"page_size": 0}, "page size 0 .* give a --page-size of 1 or more"),
        ("llama", {"page_size": -3}, "page size -3 .* give a --page-size of 1 or more"),
        ("llama", {"speculative_algorithm": "NGRAM"}, r"speculative decoding \(NGRAM\)"),
        ("llama", {"kv_cache_dtype": "fp8_e4m3"}, "KV cache dtype is 'fp8_e4m3'"),
        ("llama", {"enable_hierarchical_cache": True}, "hierarchical cache"),
        ("llama", {"enable_flexkv": True}, "--enable-flexkv keeps a copy .* knows SGLang's cache layout"),
        ("llama", {"radix_cache_backend": "flexkv"}, "--radix-cache-backend gives the KV cache"),
        ("llama", {"enable_unified_cache_external_linker": True}, "--enable-unified-cache-external-linker links"),
        ("llama", {"page_size": 64, "chunked_prefill_size": 100}, "chunk of 100 .* whole number of pages of 64"),
        ("llama", {"disaggregation_mode": "prefill"}, "prefill and decode in different engines"),
        ("llama", {"disaggregation_mode": "decode"}, "prefill and decode in different engines"),
        ("llama", {"decode_attention_backend": "torch_native"}, r"different backends \(llmir, torch_native\)"),
        ("llama", {"attention_backend": "torch_native", "prefill_attention_backend": "llmir"}, "different backends"),
        ("llama", {"attn_cp_size": 2}, "context parallelism"),
        ("llama", {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "data-parallel ranks"),
        ("llama", {"enable_torch_compile": True}, "--enable-torch-compile"),
        ("deepseek_v2", {}, "multi-head latent attention"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_arguments(
    write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch, family: str, fields: dict, reason: str
) -> None:
    monkeypatch.setattr(common, "plan_in_child", no_child)
    with pytest.raises(LlmirError, match=reason) as refusal:
        resolve(write_model(family), **fields)
    assert any(flag in str(refusal.value) for flag in ("--attention-backend llmir", "--page-size", "--chunked-prefill"))
