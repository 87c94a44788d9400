"""Small modules as text, and what a test wants to see of a module afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable

from llmir.ir.bindings import ir, passmanager

#: One attention layer; %q %k %v come from outside.
LAYER = """
%new{n} = "llm.append_kv"(%cache{n}, %k, %v, %slots) {{layer = "layers.{n}"}}
  : (!cache{n}, !kv, !kv, tensor<?xi64>) -> !cache{n}
%out{n} = "llm.paged_attention"(%q, %new{n}, %table, %start, %lengths)
  {{layer = "layers.{n}", spec = {spec}{more}}}
  : (!q, !cache{n}, tensor<?x?xi32>, tensor<?xi32>, tensor<?xi32>) -> !q
"""

MODULE = """
!q = tensor<?x{heads}x{head_size}x{dtype}>
!kv = tensor<?x{kv_heads}x{head_size}x{dtype}>
{aliases}
module attributes {{llm.allowed_block_sizes = [{allowed}], llm.block_size_fixed = {fixed},
    llm.framework = "vllm 0.32.0", llm.model = "tiny", llm.rank = 0 : i64, llm.world_size = 1 : i64}} {{
  func.func @decoder(%q: !q, %k: !kv, %v: !kv, %x: tensor<?x576xbf16>, %slots: tensor<?xi64>,
      %table: tensor<?x?xi32>, %start: tensor<?xi32>, %lengths: tensor<?xi32>, {arguments}) -> !q {{
    {layers}
    %logits = "llm.logits"(%x) {{scale = 1.0 : f64, soft_cap = 0.0 : f64,
      weight = #llm.weight<"head", tensor<{vocabulary}x576xbf16>>}}
      : (tensor<?x576xbf16>) -> tensor<?x{vocabulary}xbf16>
    return %out0 : !q
  }}
}}
"""


def cache_text(
    dtype: str, kv_heads: int, head_size: int, block_size: int, layout: str = "logical", scales: str = "none"
) -> str:
    """A cache's format as the IR prints it."""
    return (
        f'{{block_size = {block_size} : i64, dtype = "{dtype}", key_size = {head_size} : i64, layout = "{layout}", '
        f'num_kv_heads = {kv_heads} : i64, scales = "{scales}", value_size = {head_size} : i64}}'
    )


def module_text(
    *,
    heads: int = 9,
    kv_heads: int = 3,
    head_size: int = 64,
    element: str = "bf16",
    block_size: int = 128,
    layout: str = "logical",
    fixed: bool = False,
    allowed: tuple[int, ...] = (32, 64, 128),
    windows: tuple[int, ...] = (0,),
    scales: tuple[float, ...] | None = None,
    causal: bool = True,
    score_stages: str = "[]",
    more: str = "",
    vocabulary: int = 49152,
    layer: str = LAYER,
) -> str:
    """A decoder of one attention layer for each of ``windows``."""
    numbers = range(len(windows))
    dtype, scaled = ("bf16", "layer") if element == "f8E4M3FN" else (element, "none")
    format = cache_text(element, kv_heads, head_size, block_size, layout, scaled)
    cache = f"!llm.paged_kv_cache<#llm.cache_format<{format}>, 8192 : i64>"
    scales = scales or (0.125,) * len(windows)
    masks = [f"{{causal = {str(causal).lower()}, window = {window} : i64}}" for window in windows]
    specs = [
        f'#llm.attention_spec<{{cache = {format}, dtype = "{dtype}", mask = {mask}, num_heads = {heads} : i64, '
        f"scale = {scale} : f64, score_stages = {score_stages}, sinks = {str('sinks' in more).lower()}}}>"
        for mask, scale in zip(masks, scales, strict=True)
    ]
    layers = [layer.format(n=n, spec=specs[n], more=more) for n in numbers]
    return MODULE.format(
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
        aliases="\n".join(f"!cache{n} = {cache}" for n in numbers),
        allowed=", ".join(map(str, allowed)),
        fixed=str(fixed).lower(),
        arguments=", ".join(f'%cache{n}: !cache{n} {{llm.layer = "layers.{n}"}}' for n in numbers),
        layers="\n".join(layers),
        vocabulary=vocabulary,
    )


def ops(module: ir.Module) -> list[str]:
    """The ``llm`` ops of a module as printed, types left out."""
    return [re.sub(r" : \(.*", "", line.strip()) for line in str(module).splitlines() if '"llm.' in line.split("(")[0]]


def run(module: ir.Module, *passes: Callable) -> ir.Module:
    """Run passes in the pass manager, which verifies the module after each."""
    with module.context:
        manager = passmanager.PassManager("builtin.module")
        for each in passes:
            manager.add(each, name=each.name, argument=each.name)
        manager.run(module.operation)
    return module
