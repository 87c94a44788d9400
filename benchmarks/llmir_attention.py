"""llmir's kernel as one side of the comparison: compiled by the same passes that serve a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from attention_step import Case, Step, stored

from llmir import compiler, workload
from llmir.ir import build, types
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.module import ModelInfo, decoder, new_module
from llmir.ir.signature import Isa
from llmir.kernels import reference
from llmir.kernels.cpu.kernel import Kernel
from llmir.plan import PlannedKernel
from llmir.runtime.attention import AttentionRunner
from llmir.target import Target

LAYER = "attention"


def plan_kernel(case: Case, block_size: int, isa: Isa | None = None) -> PlannedKernel:
    """The kernel of a model of one attention layer, with blocks of ``block_size`` tokens.

    ``isa``: the instruction set to use; this machine's best if None.
    """
    with context(), ir.Location.unknown():
        info = ModelInfo("benchmark 1", case.name, block_size_fixed=True, allowed_block_sizes=(block_size,))
        module = new_module(info)
        with decoder(module) as d:
            heads = {"query": case.num_heads, "key": case.num_kv_heads, "value": case.num_kv_heads}
            query, key, value = (
                d.input(name, types.tensor([None, count, case.head_size], case.element_type))
                for name, count in heads.items()
            )
            cache_type = types.PagedKVCache.build(
                element_type=case.element_type,
                kv_heads=case.num_kv_heads,
                head_size=case.head_size,
                block_size=block_size,
                max_length=case.context,
            )
            cache = build.append_kv(d.cache(LAYER, cache_type), key, value, d.slots, layer=LAYER)
            scale = case.head_size**-0.5
            step = (d.block_table, d.query_start, d.sequence_lengths)
            d.output(build.paged_attention(query, cache, *step, layer=LAYER, scale=scale))
        target = Target.detect()
        target = target.with_isa(isa) if isa else target
        return compiler.compile(module, target, workload.DEFAULT).kernel_for(LAYER)


class LlmirAttention:
    """One step's attention, its keys and values in the cache already."""

    def __init__(self, step: Step, block_size: int, isa: Isa | None = None):
        case = step.case
        planned = plan_kernel(case, block_size, isa)
        signature = planned.spec.signature
        self.step = step
        self.isa = planned.spec.isa
        self.runner_of_kernel = AttentionRunner(Kernel.load(planned.spec, compiler.object_cache()), planned.policy)
        self.table = step.block_table(block_size)
        shape = (self.table.numel(), case.num_kv_heads, block_size, case.head_size)
        caches = np.zeros((2, *shape), reference.STORAGE[case.element_type])
        slots = step.slot_mapping(self.table, block_size).numpy()
        reference.append_kv(stored(step.key), stored(step.value), slots, *caches)
        self.cache = torch.from_numpy(reference.pack_pages(*caches, signature, planned.spec.isa)).clone()
        self.output = torch.full_like(step.query, torch.nan)

    def runner(self, threads: int) -> Callable[[], object]:
        """See :class:`attention_step.Side`."""
        step = self.step
        self.runner_of_kernel.begin_step(step.query_start.numpy(), step.seq_lens.numpy(), self.table.numpy(), threads)
        query = (step.query.data_ptr(), step.query.stride(0))
        output = (self.output.data_ptr(), self.output.stride(0))
        cache, attend = self.cache.data_ptr(), self.runner_of_kernel.attend
        return lambda: attend(query, (0, 0), (0, 0), output, cache, 0, 0)
