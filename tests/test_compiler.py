import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmir import compiler
from llmir.compiler import Options
from llmir.errors import LlmirError
from llmir.ir import text
from llmir.ir.bindings import NAME, VERSION, ir
from llmir.ir.dialect import context
from llmir.ir.module import reformat_caches
from llmir.kernels.cpu.object_cache import object_key
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.targets.records import Measurements, TargetError
from llmir.targets.x86.isa import INSTRUCTION_SETS
from llmir.workload import NAMED

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from pass_modules import module_text

HOST = Target.detect()
#: A target that no machine is.
ELSEWHERE = replace(Target.named("cpu:avx512_bf16"), machine="elsewhere")
GPU = Target.named("cuda:sm_90")
MEASURED = Measurements(
    read_bandwidth=10e9,
    read_bandwidth_all=20e9,
    piece_bandwidth=((1024, 1e9), (1 << 20, 10e9)),
    cached_bandwidth=((1 << 17, 60e9), (1 << 26, 20e9)),
    bf16_rate=1e11,
    f32_rate=5e10,
    fork_join_seconds=1e-5,
    threads=2,
    origin="made up",
)


@pytest.fixture
def module():
    with context() as ctx, ir.Location.unknown():
        yield text.parse(module_text(windows=(0, 512, 0)), ctx)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return Options(calibrate=False, cache=tmp_path_factory.mktemp("cache"))


def compiled(module, target=HOST, options=None, **changes):
    return compiler.compile(module, target, NAMED["chat"], replace(options or Options(calibrate=False), **changes))


def test_the_plan_holds_model_machine_and_kernels(module, options):
    plan = compiled(module, options=options)
    assert (plan.framework, plan.framework_version, plan.model, plan.rank, plan.world_size) == (
        "vllm",
        "0.32.0",
        "tiny",
        0,
        1,
    )
    assert plan.target_fingerprint == HOST.fingerprint and plan.workload["name"] == "chat"
    assert plan.versions[NAME] == VERSION
    assert [kernel.layers for kernel in plan.kernels] == [("layers.0", "layers.2"), ("layers.1",)]
    assert all(kernel.spec.attention.cache.block_size == plan.block_size for kernel in plan.kernels)


def test_every_pass_leaves_a_decision_with_numbers_and_alternatives(module, options):
    plan = compiled(module, options=options, build_kernels=False)
    by_pass = {decision.pass_name: decision for decision in plan.decisions}
    assert list(by_pass) == [
        "block-sizing",
        "attention-fusion",
        "kernel-selection",
        "prefix-sharing",
        "kernel-outlining",
        "kernel-building",
    ]
    assert all(decision.numbers and decision.reason for decision in plan.decisions)
    assert all(by_pass[name].alternatives for name in list(by_pass)[:5])


def test_the_plan_survives_json(module, options):
    plan = compiled(module, options=options, build_kernels=False)
    assert Plan.loads(plan.dumps()) == replace(plan, target=json.loads(json.dumps(plan.target)))


def test_kernels_share_prefixes_unless_the_user_switches_it_off(options):
    sharing = []
    for wanted in (True, False):
        with context() as ctx, ir.Location.unknown():
            plan = compiler.compile(
                text.parse(module_text(), ctx),
                Target.named("cpu:avx512_bf16"),
                NAMED["chat"],
                replace(options, build_kernels=False),
                prefix_sharing=wanted,
            )
        sharing.append([kernel.policy.sharing is not None for kernel in plan.kernels])
        assert Plan.loads(plan.dumps()).kernels == plan.kernels
    assert sharing == [[True], [False]]


def test_kernels_are_elf_objects_in_the_cache(module, options):
    plan = compiled(module, options=options)
    assert [kernel.object_key for kernel in plan.kernels] == [object_key(kernel.spec) for kernel in plan.kernels]

    def not_again() -> bytes:
        raise AssertionError("the object should be in the cache")

    for kernel in plan.kernels:
        assert compiler.object_cache(options.cache).get_or_build(kernel.object_key, not_again)[:4] == b"\x7fELF"


def test_a_plan_for_another_architecture_is_made_and_says_that_nothing_is_built(module, tmp_path):
    plan = compiled(module, ELSEWHERE, cache=tmp_path)
    assert [kernel.object_key for kernel in plan.kernels] == [None, None]
    assert plan.target_fingerprint == ELSEWHERE.fingerprint
    last = plan.decisions[-1]
    assert (last.pass_name, last.decision) == ("kernel-building", "not built")
    assert last.reason == f"this machine is {HOST.machine}, and kernels for elsewhere are compiled on such a one"
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_needs_none_and_leaves_its_kernels_to_triton(module, tmp_path):
    plan = compiled(module, GPU, cache=tmp_path)
    assert [kernel.object_key for kernel in plan.kernels] == [None, None]
    assert {kernel.spec.isa for kernel in plan.kernels} == {"sm_90"} and plan.layout == "row"
    assert plan.target_fingerprint == "cuda-sm_90"
    last = plan.decisions[-1]
    assert (last.pass_name, last.decision) == ("kernel-building", "not built")
    assert "Triton when serving starts" in last.reason and "`llmir compile --emit object`" in last.reason
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_survives_json(module, options):
    plan = compiled(module, GPU, options)
    assert Plan.loads(plan.dumps()).kernels == plan.kernels


def test_a_quantized_cache_is_the_plan_s_element_type(options):
    text_of = module_text(element="f8E4M3FN")
    with context() as ctx, ir.Location.unknown():
        plan = compiled(text.parse(text_of, ctx), GPU, options)
    (kernel,) = plan.kernels
    assert plan.element_type == "f8E4M3FN" and kernel.spec.attention.cache.quantized


def test_a_gpu_s_kernels_have_no_llvm_dialect(module, options):
    plan = compiled(module, GPU, options)
    with pytest.raises(LlmirError, match=r"kernels for cuda:sm_90 .* use `--emit object`"):
        compiler.emit_llvm(plan)


def test_only_this_machine_s_gpu_is_measured(module, options, monkeypatch):
    own, measured = replace(GPU, name="gpu"), []
    monkeypatch.setattr(Target, "named", lambda name: own)
    monkeypatch.setattr(
        compiler, "calibrated", lambda target, _options: measured.append(target) or target.with_measurements(MEASURED)
    )
    compiled(module, GPU, options, calibrate=True)
    assert measured == []
    with context() as ctx, ir.Location.unknown():
        plan = compiled(text.parse(module_text(), ctx), own, options, calibrate=True)
    assert measured == [own] and Target.from_json(plan.target).measured == MEASURED


@pytest.mark.skipif(HOST.machine != "x86_64", reason="named targets are x86-64")
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_kernels_of_every_instruction_set_are_built_on_any_machine(module, options, isa):
    plan = compiled(module, Target.named(f"cpu:{isa}"), options)
    assert {kernel.spec.isa for kernel in plan.kernels} == {isa}
    assert plan.target_fingerprint == f"x86_64-{isa}" and all(kernel.object_key for kernel in plan.kernels)


def test_a_processor_without_kernels_is_refused_by_what_it_lacks(module, options):
    old = replace(HOST, isa="none", features=("avx",), machine="x86_64")
    with pytest.raises(TargetError, match="lacks avx2, f16c, fma"):
        compiled(module, old, options)


def test_measured_figures_are_the_ones_in_the_remarks(module, options):
    plan = compiled(module, HOST.with_measurements(MEASURED), options, build_kernels=False)
    assert {d.numbers["figures"] for d in plan.decisions if "figures" in d.numbers} == {"made up"}
    assert Target.from_json(plan.target).measured == MEASURED


def test_only_this_machine_is_measured(module, options, monkeypatch):
    measured = []

    def calibrated(target, _options):
        measured.append(target)
        return target.with_measurements(MEASURED)

    monkeypatch.setattr(compiler, "calibrated", calibrated)
    compiled(module, ELSEWHERE, options, calibrate=True)
    assert measured == []


def test_this_machine_is_measured_unless_it_was(module, options, monkeypatch):
    monkeypatch.setattr(compiler, "calibrated", lambda target, _options: target.with_measurements(MEASURED))
    plan = compiled(module, HOST, options, calibrate=True, build_kernels=False)
    assert Target.from_json(plan.target).measured == MEASURED


def test_progress_is_told(module, options):
    steps: list[str] = []
    compiled(module, options=options, progress=steps.append)
    assert steps[0] == "deciding block size and kernels" and len(steps) == 3


def test_other_measurements_that_change_no_decision_do_not_change_the_hash(options):
    hashes = set()
    for origin in ("one", "two"):
        with context() as ctx, ir.Location.unknown():
            target = HOST.with_measurements(replace(MEASURED, origin=origin))
            hashes.add(compiled(text.parse(module_text(), ctx), target, options, build_kernels=False).module_hash)
    assert len(hashes) == 1


def test_the_hash_sees_the_model(options):
    hashes = set()
    for heads in (9, 6):
        with context() as ctx, ir.Location.unknown():
            hashes.add(
                compiled(text.parse(module_text(heads=heads), ctx), options=options, build_kernels=False).module_hash
            )
    assert len(hashes) == 2


def test_caches_of_different_types_are_an_error(options):
    def of_two_types(layer, cache):
        return replace(cache, dtype="f8E4M3FN", scales="layer") if layer == "layers.1" else cache

    with context() as ctx, ir.Location.unknown():
        mixed = text.parse(module_text(windows=(0, 0)), ctx)
        reformat_caches(mixed, of_two_types)
        with pytest.raises(LlmirError, match="one block size, layout and element type"):
            compiled(mixed, GPU, options)


def test_emitted_llm_parses_again(module, options):
    compiled(module, options=options, build_kernels=False)
    emitted = compiler.emit_llm(module)
    assert text.print_module(text.parse(emitted, module.context)) == emitted
    assert "llm.kernel" in emitted


def test_emitted_llvm_holds_every_kernel_for_any_target(module, options):
    plan = compiled(module, ELSEWHERE, options)
    emitted = compiler.emit_llvm(plan)
    assert emitted.count("\n// -----\n") == 1
    for kernel in plan.kernels:
        assert f"llvm.func @{kernel.spec.symbol}(" in emitted


def test_emitted_objects_are_elf(module, options):
    plan = compiled(module, options=options, build_kernels=False)
    objects = compiler.emit_objects(plan, options)
    assert set(objects) == {kernel.symbol for kernel in plan.kernels}
    assert all(data[:4] == b"\x7fELF" for data in objects.values())


def test_objects_for_another_machine_cannot_be_emitted(module, options):
    plan = compiled(module, ELSEWHERE, options)
    with pytest.raises(TargetError, match=r"cannot compile objects for cpu:avx512_bf16 \(elsewhere\)"):
        compiler.emit_objects(plan, options)


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMIR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "llmir"


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path))
    assert compiler.cache_folder() == tmp_path
