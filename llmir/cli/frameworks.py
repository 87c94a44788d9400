"""What ``llmir check`` looks at in each framework that is installed, and which one ``llmir compile`` reads models with.

By metadata alone: importing a framework takes many seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from llmir.errors import LlmirError
from llmir.frontends.common.versions import KnownVersions
from llmir.frontends.sglang import versions as sglang
from llmir.frontends.vllm import versions as vllm
from llmir.targets.gpu import detection
from llmir.targets.records import TargetError


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and what to do where ``remedy`` is not empty."""

    subject: str
    found: str
    remedy: str = ""
    needed: bool = True
    """Serving with llmir does not work without it; otherwise the remedy only makes things better."""

    @property
    def failed(self) -> bool:
        return self.needed and bool(self.remedy)


@dataclass(frozen=True)
class Framework:
    """A framework that llmir plugs into."""

    name: str
    """As users type it; also its frontend's folder."""
    versions: KnownVersions
    """What its frontend serves."""
    group: str
    """Its entry points for plugins."""
    variable: str
    """Names, with commas, of the plugins that it loads."""
    empty_hides: bool
    """Whether the variable, set to nothing, hides all plugins."""
    flag: str

    @property
    def title(self) -> str:
        """As its own people write it."""
        return self.versions.title


VLLM = Framework(
    name="vllm",
    versions=vllm.VERSIONS,
    group="vllm.general_plugins",
    variable="VLLM_PLUGINS",
    empty_hides=True,
    flag="--attention-backend LLMIR",
)
SGLANG = Framework(
    name="sglang",
    versions=sglang.VERSIONS,
    group="sglang.srt.plugins",
    variable="SGLANG_PLUGINS",
    empty_hides=False,
    flag="--attention-backend llmir",
)
FRAMEWORKS = (VLLM, SGLANG)
#: What SGLang imports on a CPU and no package index has: llmir's stand-in, or the real thing.
SGLANG_OPERATORS = ("llmir-sglang-cpu-shims", "sgl-kernel", "sglang-kernel")


def installed() -> list[Framework]:
    """The frameworks of this environment."""
    return [framework for framework in FRAMEWORKS if distribution(framework)]


def distribution(framework: Framework) -> tuple[str, str] | None:
    """Name and version of what carries ``framework``; None where nothing does."""
    return _first_installed(framework.versions.distributions)


def chosen(name: str | None) -> str:
    """The framework to read a model with: ``name`` if the user gave one, else the first that is installed.

    Raises LlmirError where there is none.
    """
    if name is not None:
        return name
    found = installed()
    if not found:
        raise LlmirError("no framework is installed here to read the model with: `llmir check` says what to install")
    return found[0].name


def findings() -> list[Finding]:
    """What was found of every framework that is installed."""
    present = installed()
    if not present:
        titles = " nor ".join(framework.title for framework in FRAMEWORKS)
        environments = " or ".join(f"make .venvs/{framework.name}" for framework in FRAMEWORKS)
        return [Finding("framework", f"neither {titles} is installed", f"run: {environments}")]
    found = [finding for framework in present for finding in (version(framework), plugin(framework))]
    return [*found, sglang_operators(), sglang_on_cpu()] if SGLANG in present else found


def version(framework: Framework) -> Finding:
    """Whether the frontend serves the installed release, and on what."""
    carrier = distribution(framework)
    if carrier is None:
        return Finding(framework.title, "not installed", f"run: make .venvs/{framework.name}")
    name, release = carrier
    versions, what = framework.versions, f"{name} {release}"
    served = [device for device in versions.ranges if versions.knows(device, release)]
    if len(served) == len(versions.ranges):
        return Finding(framework.title, what)
    if not served:
        ranges = " or ".join(
            dict.fromkeys(f"{versions.known(device)} on a {device.upper()}" for device in versions.ranges)
        )
        return Finding(framework.title, what, f"llmir serves {ranges}: run make .venvs/{framework.name}")
    (device,), (other,) = served, set(versions.ranges) - set(served)
    remedy = f"on a {other.upper()} llmir serves {versions.known(other)}: run make .venvs/{framework.name}"
    alone = f"{what}, served on a {device.upper()}"
    return Finding(framework.title, alone, remedy, needed=has_gpu() != (device == "gpu"))


def has_gpu() -> bool:
    """Whether there is a GPU that llmir has kernels for."""
    try:
        return detection.find() is not None
    except TargetError:
        return False


def plugin(framework: Framework) -> Finding:
    """Whether a framework will find llmir: by the entry point of the installed package, unless a variable hides it."""
    subject = f"{framework.title} plugin"
    if not any(point.name == "llmir" for point in metadata.entry_points(group=framework.group)):
        remedy = "install llmir itself into this environment: pip install --no-deps --no-build-isolation -e ."
        return Finding(subject, "not registered", remedy)
    listed = os.environ.get(framework.variable)
    if listed is not None and (listed or framework.empty_hides) and "llmir" not in map(str.strip, listed.split(",")):
        remedy = f"add llmir to {framework.variable}, or unset it"
        return Finding(subject, f"hidden by {framework.variable}={listed!r}", remedy)
    return Finding(subject, f"registered; serve with {framework.flag}")


def sglang_operators() -> Finding:
    """Whether there is what SGLang imports as ``sgl_kernel`` on a CPU."""
    subject = "SGLang operators"
    found = _first_installed(SGLANG_OPERATORS)
    if found is None:
        return Finding(subject, "no sgl_kernel", "pip install --no-deps --no-build-isolation ./shims/sglang-cpu")
    return Finding(subject, " ".join(found))


def sglang_on_cpu() -> Finding:
    """Whether SGLang knows that it runs on a CPU, where it does not find out by itself."""
    value = os.environ.get("SGLANG_USE_CPU_ENGINE")
    if value in ("1", "true", "True"):
        return Finding("SGLang on a CPU", f"SGLANG_USE_CPU_ENGINE={value}", needed=False)
    remedy = "before serving on a CPU: export SGLANG_USE_CPU_ENGINE=1"
    return Finding("SGLang on a CPU", "SGLANG_USE_CPU_ENGINE is not set", remedy, needed=False)


def _first_installed(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Name and version of the first of these distributions that is installed."""
    for name in names:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
