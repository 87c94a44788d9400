"""A plan as the benchmark of GPU kernels reads it, of small tiles that Triton's interpreter is quick with."""

from __future__ import annotations

from pathlib import Path

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.plan import FORMAT, Plan, PlannedKernel
from llmir.targets.machine import Target

SIGNATURE = AttentionSpec.dense(4, 2, 64, "bf16", block_size=16, scale=64**-0.5, layout="row")
VARIANTS = (GpuVariant("decode", 8, 16, 16, warps=4, stages=2), GpuVariant("prefill", 16, 32, 32, warps=4, stages=2))
COSTS = SharingCosts(
    most_rows=64,
    least_tokens=16,
    read_key=1.0,
    cached_key=((1, 1.0),),
    tile_key=0.01,
    decode_rows=16,
    decode_row_key=0.01,
    row=0.01,
    margin=1.0,
)
POLICY = StepPolicy(decode_tokens=8, split_keys=16, items_per_thread=2, sharing=COSTS)


def write_plan(folder: Path) -> None:
    """Puts the plan of one kernel into ``folder``."""
    spec = KernelSpec(SIGNATURE, "sm_90", VARIANTS)
    kernel = PlannedKernel(spec.symbol, spec, POLICY, ("layer",), None)
    Plan(
        format=FORMAT,
        framework="test",
        framework_version="1",
        model="tiny",
        rank=0,
        world_size=1,
        block_size=16,
        layout="row",
        element_type="bf16",
        fused=True,
        kernels=(kernel,),
        decisions=(),
        target={},
        target_fingerprint=Target.named("cuda:sm_90").fingerprint,
        workload={},
        module_hash="",
        versions={},
    ).write(folder / "tiny.json")
