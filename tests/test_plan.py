import json
import subprocess
import sys
from dataclasses import replace

import pytest

from llmir.errors import PlanError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import CpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.plan import DIGEST, FORMAT, Decision, Plan, PlannedKernel, digest_of
from llmir.targets.machine import Target
from llmir.workload import NAMED

SPEC = KernelSpec(
    AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125, layout="pair"),
    "avx512_bf16",
    (CpuVariant("decode", 1, 3, 64, 4, 4, 64), CpuVariant("prefill", 32, 6, 128, 4, 4, 0)),
)
SHARING = SharingCosts(48, 128, 20.0, ((256, 4.0), (1024, 8.5)), 2.5, 3, 0.7, 100.0, 0.9)
PLAN = Plan(
    format=FORMAT,
    framework="vllm",
    framework_version="0.32.0",
    model="tiny",
    rank=0,
    world_size=1,
    block_size=128,
    layout="pair",
    element_type="bf16",
    fused=True,
    kernels=(PlannedKernel(SPEC.symbol, SPEC, StepPolicy(1, 256, 4, SHARING), ("layers.0", "layers.1"), "ab" * 32),),
    decisions=(Decision("block-sizing", "all layers", "128", "least time", {"seconds": 1.5}, ({"block_size": 64},)),),
    target=Target.named("cpu:avx512_bf16").to_json(),
    target_fingerprint=Target.named("cpu:avx512_bf16").fingerprint,
    workload=NAMED["chat"].summary(),
    module_hash="cd" * 32,
    versions={"llmir": "0.1.0"},
)


def made_for(target: Target) -> Plan:
    """The plan for another CPU, its kernel too."""
    (kernel,) = PLAN.kernels
    kernels = (replace(kernel, spec=replace(kernel.spec, isa=target.isa)),)
    return replace(PLAN, kernels=kernels, target=target.to_json(), target_fingerprint=target.fingerprint)


def edited(path: str, value: object) -> dict:
    """The plan's JSON with the value at a dotted path replaced, and the digest of that."""
    data = json.loads(PLAN.dumps())
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return with_digest(data)


def with_digest(data: dict) -> dict:
    """A plan's JSON as if llmir had written it."""
    fields_alone = {name: value for name, value in data.items() if name != DIGEST}
    return {**fields_alone, DIGEST: digest_of(fields_alone)}


def test_json_round_trip():
    assert Plan.loads(PLAN.dumps()).dumps() == PLAN.dumps()
    assert Plan.loads(PLAN.dumps()).kernels == PLAN.kernels


def test_a_kernel_that_was_not_built_stays_so():
    plan = replace(PLAN, kernels=(replace(PLAN.kernels[0], object_key=None),))
    assert Plan.loads(plan.dumps()).kernels[0].object_key is None


def test_a_kernel_that_shares_nothing_stays_so():
    plan = replace(PLAN, kernels=(replace(PLAN.kernels[0], policy=StepPolicy(1, 256, 4)),))
    assert Plan.loads(plan.dumps()).kernels == plan.kernels


def test_a_whole_number_is_read_as_the_float_it_stands_for():
    plan = Plan.from_json(edited("kernels.0.spec.attention.scale", 1))
    assert isinstance(plan.kernels[0].spec.attention.scale, float)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("block_size", "128", "plan.block_size must be int"),
        ("block_size", True, "plan.block_size must be int"),
        ("fused", 1, "plan.fused must be bool"),
        ("kernels", {}, "plan.kernels must be tuple"),
        ("kernels.0.layers", [1], r"plan.kernels\[0\].layers\[0\] must be str"),
        ("kernels.0.spec.isa", "avx9000", r"spec.isa is 'avx9000', and must be one of avx512_bf16"),
        ("kernels.0.spec.attention.extra", 1, r"spec.attention has missing or unknown fields \['extra'\]"),
        ("kernels.0.policy", [], "policy has missing or unknown fields"),
        ("kernels.0.policy.sharing", {}, "policy.sharing has missing or unknown fields"),
        ("kernels.0.policy.sharing.row", "1", "policy.sharing.row must be float"),
        ("kernels.0.policy.sharing.cached_key", [[1]], r"sharing.cached_key\[0\] must be tuple\[int, float\]"),
        ("kernels.0.policy.sharing.cached_key", [[1.5, 1.0]], r"sharing.cached_key\[0\]\[0\] must be int"),
        ("versions", {"llmir": 1}, "plan.versions.llmir must be str"),
        ("surprise", 1, r"missing or unknown fields \['surprise'\]"),
    ],
)
def test_a_value_that_does_not_fit_is_a_plan_error_that_names_it(path, value, where):
    with pytest.raises(PlanError, match=where):
        Plan.from_json(edited(path, value))


@pytest.mark.parametrize("name", ["kernels", "block_size", "target_fingerprint"])
def test_a_missing_field_is_a_plan_error_that_names_it(name):
    data = json.loads(PLAN.dumps())
    del data[name]
    with pytest.raises(PlanError, match=name):
        Plan.from_json(with_digest(data))


def test_another_format_is_refused():
    with pytest.raises(PlanError, match=r"format 99 and this llmir reads 4: compile it again"):
        Plan.from_json(edited("format", 99))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"plan"', "\0", "[" * 100_000])
def test_other_text_is_a_plan_error(text):
    with pytest.raises(PlanError, match=r"this is no plan of llmir"):
        Plan.loads(text)


def test_a_truncated_file_is_a_plan_error_that_names_it(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.dumps()[:-100])
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.read(path)


def test_a_binary_file_is_a_plan_error(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="it is not text"):
        Plan.read(path)


def test_no_file_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="No such file"):
        Plan.read(tmp_path / "none.json")


def test_a_written_plan_reads_the_same(tmp_path):
    PLAN.write(tmp_path / "folder" / "plan.json")
    assert Plan.read(tmp_path / "folder" / "plan.json").dumps() == PLAN.dumps()


def test_writing_where_nothing_can_be_written_is_a_plan_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PlanError, match="cannot be written"):
        PLAN.write(tmp_path / "file" / "plan.json")


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanError):
        PLAN.write(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_machine_it_was_made_for_is_accepted():
    PLAN.check_target(Target.named("cpu:avx512_bf16").runnable)


def test_another_machine_is_refused():
    with pytest.raises(
        PlanError, match=r"made for a machine x86_64-avx512_bf16, and this one is x86_64-avx2: compile it again here"
    ):
        PLAN.check_target(Target.named("cpu:avx2").runnable)


def test_a_layer_finds_its_kernel():
    assert PLAN.kernel_for("layers.1") is PLAN.kernels[0]


def test_a_layer_without_a_kernel_is_a_plan_error():
    with pytest.raises(PlanError, match=r"no kernel for layer 'layers\.2'"):
        PLAN.kernel_for("layers.2")


def test_what_serving_sees_is_the_same_after_another_calibration():
    other = replace(PLAN, decisions=(), target={**PLAN.target, "measured": {"read_bandwidth": 1.0}})
    assert other.for_serving() == PLAN.for_serving()


@pytest.mark.parametrize("module", ["llmir.plan", "llmir.targets.machine", "llmir.workload", "llmir.compiler"])
def test_a_serving_process_imports_it_without_mlir_and_torch(module):
    check = f"import sys, {module}; assert not {{'torch', 'torch_mlir', 'mlir', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("change", [{"digest": None}, {"digest": "0" * 64}, {"block_size": 64}, {"model": "tiny2"}])
def test_a_plan_that_somebody_changed_is_refused(change):
    with pytest.raises(PlanError, match="not as llmir wrote it, its digest is of another content: compile it again"):
        Plan.from_json({**PLAN.to_json(), **change})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "block_size",
            64,
            r"plan.block_size is 64, and must be as plan.kernels\[0\].spec.attention.cache.block_size, 128",
        ),
        ("layout", "row", "plan.layout is 'row', and must be as"),
        ("element_type", "f16", "plan.element_type is 'f16', and must be as"),
        ("target_fingerprint", "x86_64-avx2", "plan.target_fingerprint is 'avx2', and must be as"),
        ("kernels", [], "plan.kernels are none"),
        ("kernels.0.layers", ["a", "a"], "layers have a more than once"),
        ("rank", 1, "plan.rank is 1, and must be from 0 to below world_size, 1"),
        (
            "kernels.0.spec.variants.1.name",
            "decode",
            r"variants are \['decode', 'decode'\], and must be one decode and",
        ),
        ("kernels.0.policy.items_per_thread", 0, r"kernels\[0\].policy.items_per_thread is 0, and must be"),
        (
            "kernels.0.spec.attention.cache.scales",
            "head",
            r"spec.attention: a KV cache of bf16 with scales has no kernel",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_by_name(path, value, words):
    with pytest.raises(PlanError, match=words):
        Plan.from_json(edited(path, value))
