"""Which SGLang this is, and whether llmir knows what it calls there."""

from __future__ import annotations

from llmir.frontends.common.versions import KnownVersions

VERSIONS = KnownVersions(
    title="SGLang",
    distributions=("sglang",),
    backend="llmir",
    ranges={"cpu": ((0, 5, 23), (0, 5, 23)), "gpu": ((0, 5, 23), (0, 5, 23))},
)


def framework() -> str:
    """Name and version, as plans keep it: ``sglang 0.5.23``."""
    return f"sglang {VERSIONS.installed()}"
