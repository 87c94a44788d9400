"""llmir's kernel as one side of the comparison: compiled by the same passes that serve a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from attention_step import Case, Step, stored

from llmir import compiler, workload
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.ir.one_layer import LAYER, attention_module
from llmir.kernels import reference
from llmir.kernels.cpu.kernel import Kernel
from llmir.plan import PlannedKernel
from llmir.runtime import step as runtime
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.targets.machine import Target


def plan_kernel(case: Case, block_size: int, isa: str | None = None) -> PlannedKernel:
    """The kernel of a model of one attention layer, with blocks of ``block_size`` tokens.

    ``isa``: the instruction set to use; this machine's best if None.
    """
    sizes = (case.num_heads, case.num_kv_heads, case.head_size, block_size)
    module = attention_module(case.name, case.element_type, *sizes, max_length=case.context)
    target = Target.detect()
    target = target.with_isa(isa) if isa else target
    return compiler.compile(module, target, workload.DEFAULT).kernel_for(LAYER)


class LlmirAttention:
    """One step's attention, its keys and values in the cache already."""

    def __init__(
        self,
        step: Step,
        block_size: int,
        isa: str | None = None,
        change: Callable[[AttentionSpec], AttentionSpec] = lambda attention: attention,
    ):
        """``change``: what attention has beyond the case's."""
        case = step.case
        planned = plan_kernel(case, block_size, isa)
        attention = change(planned.spec.attention)
        planned = replace(planned, spec=replace(planned.spec, attention=attention))
        self.sinks = torch.randn(case.num_heads) if attention.sinks else None
        self.slopes = 2.0 ** -(torch.arange(case.num_heads) + 1.0) if attention.alibi else None
        self.step = step
        self.isa = planned.spec.isa
        self.runner_of_kernel = CpuAttentionRunner(Kernel.load(planned.spec, compiler.object_cache()), planned.policy)
        self.table = step.block_table(block_size)
        shape = (self.table.numel(), case.num_kv_heads, block_size, case.head_size)
        caches = np.zeros((2, *shape), DTYPES[case.element_type].storage)
        slots = step.slot_mapping(self.table, block_size).numpy()
        reference.append_kv(stored(step.key), stored(step.value), slots, *caches)
        self.cache = torch.from_numpy(reference.pack_pages(*caches, attention.cache, planned.spec.isa)).clone()
        self.output = torch.full_like(step.query, torch.nan)

    def runner(self, threads: int) -> Callable[[], object]:
        """See :class:`attention_step.Side`."""
        step = self.step
        host = step.query_start.numpy(), step.seq_lens.numpy(), self.table.numpy()
        self.runner_of_kernel.begin_step(runtime.Step(*host), threads)
        query = (step.query.data_ptr(), step.query.stride(0))
        output = (self.output.data_ptr(), self.output.stride(0))
        cache, attend = self.cache.data_ptr(), self.runner_of_kernel.attend
        own = {name: 0 if x is None else x.data_ptr() for name, x in (("sinks", self.sinks), ("slopes", self.slopes))}
        return lambda: attend(query, (0, 0), (0, 0), output, cache, 0, 0, **own)
