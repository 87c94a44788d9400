"""This machine's GPU, as the amdgpu driver shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmir.targets.gpu.architectures import known, maker_of
from llmir.targets.records import Hardware

#: What the driver tells of processors, a folder each.
NODES = "sys/class/kfd/kfd/topology/nodes"


def find(root: Path) -> Hardware | None:
    """The first GPU among the nodes of the amdgpu driver, with caches as published; None where there is none."""
    for node in sorted((root / NODES).glob("*"), key=lambda path: int(path.name)):
        try:
            lines = (node / "properties").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # a GPU that this process may not use
        facts = {name: int(value) for name, value in map(str.split, lines)}
        if not facts.get("simd_count"):
            continue  # a CPU
        version = facts["gfx_target_version"]  # 90402: gfx942, the last two numbers of it as hexadecimal digits
        isa = known(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}", "this AMD GPU")
        published = maker_of(isa).typical[isa]
        return replace(published, model=f"AMD {isa}", cores=facts["simd_count"] // facts["simd_per_cu"])
    return None
