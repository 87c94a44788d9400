"""A plan for an H100, without compiling anything."""

from typing import Any

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.plan import FORMAT, Plan, PlannedKernel
from llmir.targets.machine import Target
from llmir.workload import NAMED

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 64, 16
SCALE = HEAD_SIZE**-0.5
LAYERS = ("layers.0", "layers.1")
VARIANTS = (
    GpuVariant("decode", 8, 16, 32, warps=4, stages=2),
    GpuVariant("prefill", 32, 64, 32, warps=4, stages=2),
)
#: Costs by which everything that can be shared is.
ALWAYS_SHARED = SharingCosts(64, 16, 10.0, ((1, 10.0),), 0.0001, 16, 0.0001, 0.0, 1.0)


def gpu_plan(*, sharing: bool = True, **attention: Any) -> Plan:
    """A plan of two layers with one kernel, of this attention."""
    facts = {"dtype": "bf16", "block_size": BLOCK, "scale": SCALE, "layout": "row", **attention}
    spec = KernelSpec(AttentionSpec.dense(HEADS, KV_HEADS, HEAD_SIZE, **facts), "sm_90", VARIANTS)
    policy = StepPolicy(1, 64, 2, ALWAYS_SHARED if sharing else None)
    target = Target.named("cuda:sm_90")
    return Plan(
        format=FORMAT,
        framework="vllm",
        framework_version="0.32.0",
        model="tiny",
        rank=0,
        world_size=1,
        block_size=spec.attention.cache.block_size,
        layout="row",
        element_type=spec.attention.cache.dtype,
        fused=True,
        kernels=(PlannedKernel(spec.symbol, spec, policy, LAYERS, None),),
        decisions=(),
        target=target.to_json(),
        target_fingerprint=target.fingerprint,
        workload=NAMED["chat"].summary(),
        module_hash="ab" * 32,
        versions={"llmir": "0.1.0"},
    )
