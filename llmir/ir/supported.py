"""Which attention there is a kernel for, and on what: the only place that says so.

Frontends, passes, plans and kernels ask here; a frontend adds the framework's own words.
"""

from __future__ import annotations

from llmir.ir.attention_spec import QUANTIZED_DTYPE, AttentionSpec, SoftCap
from llmir.ir.dtypes import QUERY_DTYPES
from llmir.ir.kernel_spec import HEAD_SIZES, is_gpu

#: What tensor cores multiply and Triton compiles for every architecture here.
GPU_DTYPES = ("bf16", "f16")
#: Architectures with QUANTIZED_DTYPE: Triton has none on sm_80, and gfx942's 8-bit numbers are of another format.
QUANTIZED_ISAS = ("sm_90", "sm_100")
#: Rows of the largest tile of a GPU's kernels: larger ones leave no registers for the rest.
MOST_GPU_ROWS = 128


def unsupported(spec: AttentionSpec, isa: str) -> list[str]:
    """Why no kernel for the instruction set or GPU architecture ``isa`` computes ``spec``: every reason, a clause each.

    None: there is one, in some layout of the cache.
    """
    on_gpu, value_size = is_gpu(isa), spec.cache.value_size
    where, dtypes = ("on a GPU", GPU_DTYPES) if on_gpu else ("on a CPU", QUERY_DTYPES)
    found = {
        "only causal attention has a kernel": not spec.mask.causal,
        **{f"{stage.title} has no kernel": not isinstance(stage, SoftCap) for stage in spec.score_stages},
        "score stages have a kernel one at a time": len(spec.score_stages) > 1,
        f"attention sinks have no kernel {where}": spec.sinks and not on_gpu,
        f"its head size is {spec.head_size}, and there are kernels for {', '.join(map(str, HEAD_SIZES))}": (
            spec.head_size not in HEAD_SIZES
        ),
        f"its values are of another size ({value_size}) than keys ({spec.head_size})": value_size != spec.head_size,
        f"queries of {spec.dtype} have no kernel {where}; there are kernels for {' and '.join(dtypes)}": (
            spec.dtype not in dtypes
        ),
        f"{spec.queries_per_kv} query heads share a KV head, and a tile of a GPU's kernels has at most "
        f"{MOST_GPU_ROWS} rows": on_gpu and spec.queries_per_kv > MOST_GPU_ROWS,
    }
    return [*(reason for reason, applies in found.items() if applies), *_of_cache(spec, isa, where)]


def _of_cache(spec: AttentionSpec, isa: str, where: str) -> list[str]:
    """Why there is no kernel for the cache: one of the queries' type has one, and a quantized one on some GPUs."""
    cache = spec.cache
    if (cache.dtype, cache.scales) == (spec.dtype, "none"):
        return []
    if not is_gpu(isa) or (cache.dtype, cache.scales) != (QUANTIZED_DTYPE, "layer"):
        with_scales = " with scales" if cache.dtype == spec.dtype else ""
        return [f"a KV cache of {cache.dtype}{with_scales} has no kernel {where}"]
    if isa in QUANTIZED_ISAS:
        return []
    return [f"a KV cache of {cache.dtype} has no kernel on {isa}; there are for {', '.join(QUANTIZED_ISAS)}"]
