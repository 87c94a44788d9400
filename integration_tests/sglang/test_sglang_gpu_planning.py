"""Plans for GPUs on SGLang's server arguments, and what is refused there; on a machine without a GPU.

SGLang resolves its arguments for ``device="cuda"`` as it would beside a GPU, except where it asks the driver.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_fakes
import pytest
import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
from tiny_models import LAYERS, WriteModel

from llmir import compiler
from llmir.errors import LlmirError, PlanError
from llmir.frontends.common import planning as common
from llmir.frontends.common.options import Options
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang import support
from llmir.frontends.sglang.importer import configure, import_module
from llmir.frontends.sglang.offline import import_model
from llmir.frontends.sglang.planning import plan_of
from llmir.frontends.sglang.versions import VERSIONS
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant
from llmir.ir.module import model_info, ops_of
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.targets.records import TargetError
from llmir.workload import DEFAULT


def resolve(folder: str, **fields: Any) -> ServerArgs:
    """Server arguments that ask for llmir on a GPU, resolved as SGLang does before it starts processes."""
    asked = {"device": "cuda", "skip_tokenizer_init": True, "attention_backend": "llmir", **fields}
    server_args = ServerArgs(model_path=folder, **asked)
    server_args.resolve_once()
    return server_args


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """``gpu("sm_90")``: as on a machine with this GPU, where plans are made at once; the list of targets asked for."""
    asked: list[Target] = []
    named = Target.named

    def have(isa: str) -> list[Target]:
        name = f"hip:{isa}" if isa.startswith("gfx") else f"cuda:{isa}"

        def child(module: str, payload: tuple[dict[str, Any], Options, Target]) -> Plan:
            fields, _, target = payload
            assert fields["device"] == "cuda"
            asked.append(target)
            return gpu_fakes.plan(LAYERS, isa=target.isa)

        monkeypatch.setattr(Target, "named", lambda wanted: named(name if wanted == "gpu" else wanted))
        monkeypatch.setattr(common, "plan_in_child", child)
        return asked

    return have


@pytest.fixture
def h100(gpu, cache: Path) -> Iterator[list[Target]]:
    yield gpu("sm_90")


def test_a_plan_is_made_for_the_gpu_that_is_there(write_model: WriteModel, h100: list[Target]) -> None:
    server_args = resolve(write_model("llama"))
    assert [target.isa for target in h100] == ["sm_90"]
    assert plan_of(server_args).kernels[0].spec.isa == "sm_90"


@pytest.mark.parametrize("isa", ["sm_80", "sm_100", "gfx942"])
def test_each_gpu_has_a_plan_of_its_own(write_model: WriteModel, gpu, cache: Path, isa: str) -> None:
    folder = write_model("llama")
    gpu("sm_90")
    resolve(folder)
    asked = gpu(isa)
    resolve(folder)
    assert [target.isa for target in asked] == ["sm_90", isa]


def test_the_plan_sets_the_page_size(write_model: WriteModel, h100: list[Target]) -> None:
    assert resolving_view(resolve(write_model("llama"))).page_size == gpu_fakes.PAGE


def test_a_page_size_unlike_the_plans_is_refused(write_model: WriteModel, h100: list[Target]) -> None:
    with pytest.raises(PlanError, match="16 tokens, and --page-size says 64"):
        resolve(write_model("llama"), page_size=64)


def test_graphs_stay_as_sglang_resolved_them(write_model: WriteModel, h100: list[Target]) -> None:
    folder = write_model("llama")
    ours = resolving_view(resolve(folder)).cuda_graph_config
    theirs = resolving_view(resolve(folder, attention_backend="triton")).cuda_graph_config
    assert ours == theirs
    assert ours.decode.backend == "full"


@pytest.mark.parametrize(
    "fields",
    [
        {"cuda_graph_backend_decode": "breakable"},
        {"cuda_graph_backend_prefill": "breakable"},
        {"disable_cuda_graph": True},
        {"kv_cache_dtype": "bf16"},
        {"enable_mixed_chunk": True},
        {"tp_size": 2},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_what_a_gpu_serves_is_not_refused(write_model: WriteModel, h100: list[Target], fields: dict) -> None:
    resolve(write_model("llama"), **fields)
    assert len(h100) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"page_size": 1}, "page size 1 has no kernel on a GPU; give a --page-size of 16, 32, 64, 128"),
        ({"page_size": 24}, "page size 24 has no kernel on a GPU"),
        (
            {"chunked_prefill_size": 100},
            "give a --chunked-prefill-size that is a multiple of 16",
        ),
        ({"page_size": 256}, "page size 256 has no kernel on a GPU"),
        ({"dtype": "float32"}, "bfloat16 and float16 on a GPU"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype is 'fp8_e5m2', .* fp8_e4m3 on sm_90 and sm_100"),
        ({"cuda_graph_backend_prefill": "full"}, "CUDA graphs of whole prefills .* breakable ones are served"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
        ({"speculative_algorithm": "NGRAM"}, r"speculative decoding \(NGRAM\), whose drafts"),
        ({"enable_hierarchical_cache": True}, "hierarchical cache"),
        ({"disaggregation_mode": "prefill"}, "prefill and decode in different engines"),
        ({"disaggregation_mode": "decode"}, "prefill and decode in different engines"),
        ({"decode_attention_backend": "triton"}, r"different backends \(llmir, triton\)"),
        ({"is_embedding": True}, "embedding model"),
        ({"attn_cp_size": 2}, "context parallelism"),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "data-parallel ranks"),
        ({"enable_two_batch_overlap": True}, "two batches at once"),
        ({"kv_canary": "log"}, "--kv-canary"),
    ],
    ids=str,
)
def test_what_a_gpu_cannot_serve_is_refused(
    write_model: WriteModel, h100: list[Target], fields: dict, reason: str
) -> None:
    with pytest.raises(LlmirError, match=reason):
        resolve(write_model("llama"), **fields)
    assert h100 == []


@pytest.mark.parametrize("isa", ["sm_90", "sm_100"])
def test_fp8_caches_are_served_where_the_gpu_multiplies_them(
    write_model: WriteModel, gpu, cache: Path, isa: str
) -> None:
    asked = gpu(isa)
    resolve(write_model("llama"), kv_cache_dtype="fp8_e4m3")
    assert len(asked) == 1


@pytest.mark.parametrize("isa", ["sm_80", "gfx942"])
def test_fp8_caches_are_refused_elsewhere(write_model: WriteModel, gpu, cache: Path, isa: str) -> None:
    gpu(isa)
    with pytest.raises(UnsupportedFeatureError, match=r"'fp8_e4m3', .* on sm_90 and sm_100"):
        resolve(write_model("llama"), kv_cache_dtype="fp8_e4m3")


def test_the_cache_dtype_is_part_of_what_a_plan_is_for(write_model: WriteModel, h100: list[Target]) -> None:
    folder = write_model("llama")
    resolve(folder)
    resolve(folder, kv_cache_dtype="fp8_e4m3")
    assert len(h100) == 2


@pytest.fixture
def with_sinks(write_model: WriteModel) -> str:
    """A dense model whose attention layers have sinks."""
    changes = {
        "model_type": "granite_swa",
        "architectures": ["GraniteSWAForCausalLM"],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 128,
        "pad_token_id": 0,
    }
    return write_model("llama", **changes)


def test_windowed_layers_in_a_pool_of_their_own_are_refused(with_sinks: str, h100: list[Target]) -> None:
    with pytest.raises(UnsupportedFeatureError, match="--disable-hybrid-swa-memory"):
        resolve(with_sinks)


def test_gpt_oss_is_refused_by_sglang_itself(write_model: WriteModel, h100: list[Target]) -> None:
    with pytest.raises(AssertionError, match="GptOssForCausalLM requires one of"):
        resolve(write_model("gpt_oss"), disable_hybrid_swa_memory=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(write_model: WriteModel, cache: Path) -> None:
    with pytest.raises(TargetError, match="no GPU was found"):
        resolve(write_model("llama"))


def test_a_target_that_the_gpu_cannot_run_is_refused(
    write_model: WriteModel, h100: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMIR_TARGET", "cuda:sm_80")
    with pytest.raises(LlmirError, match="cannot run kernels for target 'cuda:sm_80', it has sm_90"):
        resolve(write_model("llama"))


@pytest.mark.parametrize(("device", "isa", "reason"), [("xpu", "avx2", "device is 'xpu'"), ("cuda", "avx2", "avx2")])
def test_other_devices_are_refused(write_model: WriteModel, device: str, isa: str, reason: str) -> None:
    server_args = configure(model_path=write_model("llama"), skip_tokenizer_init=True)

    class Elsewhere:
        page_size = None

        def __getattr__(self, name: str) -> Any:
            return device if name == "device" else getattr(resolving_view(server_args), name)

    with pytest.raises(UnsupportedFeatureError, match=reason):
        support.check_arguments(Elsewhere(), model_config_of(server_args), isa)


class TestPlanFiles:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LLMIR_PLAN", str(tmp_path / "plan.json"))
        return tmp_path / "plan.json"

    def write(self, folder: str, file: Path, **changes: Any) -> None:
        made = gpu_fakes.plan(LAYERS, isa=changes.pop("isa", "sm_90"))
        version = VERSIONS.installed()
        replace(made, **{"model": folder, "framework_version": version, **changes}).write(file)

    def test_one_for_this_gpu_is_served(self, write_model: WriteModel, h100: list[Target], file: Path) -> None:
        folder = write_model("llama")
        self.write(folder, file)
        assert plan_of(resolve(folder)).kernels == gpu_fakes.plan(LAYERS).kernels
        assert h100 == []

    def test_one_for_another_machine_is_refused(self, write_model: WriteModel, h100: list[Target], file: Path) -> None:
        folder = write_model("llama")
        self.write(folder, file, isa="sm_80")
        with pytest.raises(PlanError, match="made for a machine cuda-sm_80, and this one is cuda-sm_90"):
            resolve(folder)


# ---- reading models for a GPU


def signatures(module: Any) -> list[AttentionSpec]:
    return [spec_of(op) for op in ops_of(module, PagedAttention)]


def load(folder: str, **fields: Any) -> Any:
    return import_module(configure(model_path=folder, device="cuda", skip_tokenizer_init=True, **fields), isa="sm_90")


def test_page_sizes_are_those_of_gpus(write_model: WriteModel) -> None:
    info = model_info(load(write_model("llama")))
    assert (info.block_size_fixed, info.allowed_block_sizes) == (False, (16, 32, 64, 128))


def test_an_fp8_cache_is_in_the_signature(write_model: WriteModel) -> None:
    [first, _] = signatures(load(write_model("llama"), kv_cache_dtype="fp8_e4m3"))
    assert (first.cache.quantized, first.dtype, first.sinks) == (True, "bf16", False)


def test_head_counts_are_not_padded_as_on_a_cpu(write_model: WriteModel) -> None:
    [first, _] = signatures(load(write_model("llama"), tp_size=4))
    assert (first.num_heads, first.num_kv_heads) == (1, 1)


def test_sinks_are_in_the_signature(with_sinks: str) -> None:
    found = signatures(load(with_sinks, disable_hybrid_swa_memory=True))
    assert [(s.sinks, s.mask.window) for s in found] == [(True, 128), (True, 0)]


def test_sinks_are_in_a_cpu_s_signature_too(with_sinks: str) -> None:
    args = configure(model_path=with_sinks, skip_tokenizer_init=True, disable_hybrid_swa_memory=True)
    assert [s.sinks for s in signatures(import_module(args))] == [True, True]


def test_a_plan_for_a_gpu_is_made_without_one(write_model: WriteModel, tmp_path: Path) -> None:
    target = Target.named("cuda:sm_90")
    module = import_model(write_model("llama"), target)
    options = compiler.Options(calibrate=False, build_kernels=False, cache=tmp_path)
    made = compiler.compile(module, target, DEFAULT, options)
    assert made.target_fingerprint == "cuda-sm_90"
    assert made.layout == "row"
    assert made.block_size in support.GPU_PAGE_SIZES
    assert all(isinstance(variant, GpuVariant) for kernel in made.kernels for variant in kernel.spec.variants)


def test_what_a_target_cannot_serve_is_refused_before_it_is_read(write_model: WriteModel) -> None:
    with pytest.raises(UnsupportedFeatureError, match="'fp8_e4m3'"):
        import_model(write_model("llama"), Target.named("cuda:sm_80"), kv_cache_dtype="fp8_e4m3")
