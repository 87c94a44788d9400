"""Which versions of a framework its frontend knows, by device.

Frameworks promise no stable interface to attention backends, so a version that nobody has read is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmir.frontends.common.support import WITHOUT, UnsupportedFeatureError, installed_version

#: The first numbers of a version, as many as tell apart what is known.
Release = tuple[int, ...]


@dataclass(frozen=True)
class KnownVersions:
    """One framework's."""

    title: str
    """As its own people write it."""
    distributions: tuple[str, ...]
    """What carries its module; a CPU build may have a name of its own."""
    backend: str
    """What the framework's flag calls llmir."""
    ranges: Mapping[str, tuple[Release, Release]]
    """First and last release that the frontend knows, by device: "cpu", "gpu"."""

    def installed(self) -> str:
        """The version that is installed; "unknown" where none is."""
        return installed_version(*self.distributions)

    def known(self, device: str) -> str:
        """What is known on ``device``, in words: ``0.26 to 0.32``."""
        return " to ".join(dict.fromkeys(".".join(map(str, release)) for release in self.ranges[device]))

    def knows(self, device: str, version: str) -> bool:
        """Whether the frontend knows ``version`` on ``device``."""
        first, last = self.ranges[device]
        numbers = re.match(r"\d+(?:\.\d+)*", version)
        release = tuple(map(int, numbers[0].split("."))) if numbers else ()
        return first <= release[: len(first)] and release[: len(last)] <= last

    def check(self, device: str, version: str | None = None) -> None:
        """Raise UnsupportedFeatureError unless ``version``, the one installed if not given, is known on ``device``."""
        found = version or self.installed()
        if not self.knows(device, found):
            raise UnsupportedFeatureError(
                f"llmir cannot serve this: {self.title} {found} is installed, and on a {device.upper()} llmir knows "
                f"{self.title} {self.known(device)}; install one of these, or "
                + WITHOUT.format(name=self.backend, framework=self.title)
            )
