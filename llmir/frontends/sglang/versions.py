"""Which SGLang this is, and whether llmir knows what it calls there."""

from __future__ import annotations

from llmir.frontends.common.versions import KnownVersions

_READ = (0, 5, 23)

VERSIONS = KnownVersions(
    title="SGLang",
    distributions=("sglang",),
    backend="llmir",
    ranges={"cpu": (_READ, _READ), "gpu": (_READ, _READ)},
)


def framework() -> str:
    """Name and version, as plans keep it: ``sglang 0.5.23``."""
    return f"sglang {VERSIONS.installed()}"
