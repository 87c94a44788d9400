"""Which attention there is a kernel for, and on what: the only place that says so.

Frontends, passes, plans and kernels ask here; a frontend adds the framework's own words.
"""

from __future__ import annotations

from llmir.ir.attention_spec import QUANTIZED_DTYPE, Alibi, AttentionSpec, ScoreStage, SoftCap
from llmir.ir.dtypes import QUERY_DTYPES
from llmir.ir.kernel_spec import is_gpu

#: Sizes of a head: on a GPU, of keys and of values alike; tensors are read by 16 elements, and rows of more than 256
#: leave no registers.
GPU_HEAD_SIZES = range(32, 256 + 1, 16)
#: On a CPU, of keys and of values each by themselves: narrow vectors hold 8, and the last is a latent key with its
#: rotary part.
CPU_HEAD_SIZES = range(32, 576 + 1, 8)
MOST_HEAD_SIZE = CPU_HEAD_SIZES[-1]
#: What tensor cores multiply and Triton compiles for every architecture here.
GPU_DTYPES = ("bf16", "f16")
#: Architectures with QUANTIZED_DTYPE: Triton has none on sm_80, and gfx942's 8-bit numbers are of another format.
QUANTIZED_ISAS = ("sm_90", "sm_100")
#: Rows of the largest tile of a GPU's kernels: larger ones leave no registers for the rest.
MOST_GPU_ROWS = 128
#: Score stages that there are kernels for, in the order that these compute them.
_CPU_STAGES: tuple[type[ScoreStage], ...] = (SoftCap, Alibi)
_GPU_STAGES: tuple[type[ScoreStage], ...] = (SoftCap,)


def head_sizes(*, on_gpu: bool) -> range:
    """The sizes of a head that kernels have."""
    return GPU_HEAD_SIZES if on_gpu else CPU_HEAD_SIZES


def unsupported(spec: AttentionSpec, isa: str) -> list[str]:
    """Why no kernel for the instruction set or GPU architecture ``isa`` computes ``spec``: every reason, a clause each.

    None: there is one, in some layout of the cache.
    """
    on_gpu, value_size = is_gpu(isa), spec.value_size
    where, dtypes = ("on a GPU", GPU_DTYPES) if on_gpu else ("on a CPU", QUERY_DTYPES)
    sizes = head_sizes(on_gpu=on_gpu)
    known = f"multiples of {sizes.step} from {sizes[0]} to {sizes[-1]}"
    found = {
        "only causal attention has a kernel": not spec.mask.causal,
        f"its head size is {spec.head_size}, and there are kernels for {known} {where}": (spec.head_size not in sizes),
        f"its values are of another size ({value_size}) than keys ({spec.head_size}), which has no kernel {where}": (
            on_gpu and value_size != spec.head_size
        ),
        f"its values are of size {value_size}, and there are kernels for {known} {where}": (
            not on_gpu and value_size != spec.head_size and value_size not in sizes
        ),
        f"queries of {spec.dtype} have no kernel {where}; there are kernels for {' and '.join(dtypes)}": (
            spec.dtype not in dtypes
        ),
        f"{spec.queries_per_kv} query heads share a KV head, and a tile of a GPU's kernels has at most "
        f"{MOST_GPU_ROWS} rows": on_gpu and spec.queries_per_kv > MOST_GPU_ROWS,
    }
    reasons = [reason for reason, applies in found.items() if applies]
    return [*_of_stages(spec, _GPU_STAGES if on_gpu else _CPU_STAGES, where), *reasons, *_of_cache(spec, isa, where)]


def _of_stages(spec: AttentionSpec, known: tuple[type[ScoreStage], ...], where: str) -> list[str]:
    """Why there is no kernel for what scores go through: each of ``known`` once at most, in that order."""
    reasons = [f"{stage.title} has no kernel {where}" for stage in spec.score_stages if not isinstance(stage, known)]
    order = [known.index(type(stage)) for stage in spec.score_stages if isinstance(stage, known)]
    if order != sorted(set(order)):
        words = ", then ".join(stage.title for stage in spec.score_stages)
        reasons.append(f"scores that go through {words} have no kernel {where}")
    return reasons


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
