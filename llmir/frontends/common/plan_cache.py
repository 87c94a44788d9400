"""Plans kept on disk from one start of a framework to the next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import llmir
from llmir.cache import FOLDERS, PLANS, KeptFolder, UntrustedError
from llmir.errors import PlanError
from llmir.frontends.common.options import Options
from llmir.kernels.build_lock import build_lock
from llmir.kernels.source_digest import files_digest
from llmir.plan import Plan
from llmir.targets.machine import Target

#: Distributions whose version changes what is imported or compiled, beside the framework's own.
VERSIONED = ("torch", "torch-mlir", "mlir", "transformers")
#: Packages of llmir that no plan depends on.
NOT_COMPILING = ("cli", "compare")


def plan_key(facts: Mapping[str, Any], options: Options, target: Target) -> str:
    """A hash of everything that a plan depends on: model, framework, target, options and llmir itself.

    ``facts`` is what the framework's configuration says: JSON values, or what ``str`` tells apart. Its "framework" is
    the framework's name and version, and the name is that of its frontend's folder.
    """
    framework = facts["framework"].partition(" ")[0]
    parts = {
        "facts": facts,
        "options": [options.workload, _file_digest(options.workload), options.target, options.shares_prefixes],
        "target": [target.fingerprint, {**target.to_json(), "measured": None}],
        "versions": {name: _version(name) for name in VERSIONED},
        "llmir": [llmir.__version__, source_digest(framework)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def get_or_make(key: str, make: Callable[[], Plan], logger: logging.Logger) -> Plan:
    """The plan kept under ``key``; made, and kept, if there is none that can be read.

    Two processes that ask at once make it once. A cache folder that cannot be written, or that others can write, costs
    a warning. What ``make`` raises is passed on, nothing is kept, and the next one may make it; LlmirError is raised
    where ``make`` asks for the plan that it is making.
    """
    from llmir.compiler import cache_folder

    folder, name = KeptFolder(cache_folder() / PLANS), f"{key}.json"
    with contextlib.suppress(PlanError):  # the usual start takes no lock
        if (plan := _read(folder, name, logger)) is not None:
            return plan
    started = time.monotonic()
    with build_lock(folder, key) as why_not:
        if why_not is not None:
            logger.warning("llmir: cannot keep plans in %s (%s); compiling without the cache", folder.path, why_not)
            return make()
        try:  # spoilt, or made by another process meanwhile?
            if (plan := _read(folder, name, logger)) is not None:
                return plan
        except PlanError as error:
            logger.warning("llmir: the kept plan is of no use (%s); compiling again", error)
        plan = make()
        try:
            folder.write(name, plan.dumps().encode())
        except (OSError, UntrustedError) as error:
            logger.warning("llmir: cannot keep the plan (%s); the next start compiles again", error)
        else:
            seconds = time.monotonic() - started
            logger.info("llmir: compiled in %.1f s; see why with: llmir explain %s", seconds, folder.path / name)
            _prune(cache_folder())
        return plan


def _read(folder: KeptFolder, name: str, logger: logging.Logger) -> Plan | None:
    """The plan kept in ``folder``, None where there is none; PlanError where it is of no use."""
    path = folder.path / name
    try:
        kept = folder.read(name)
        plan = None if kept is None else Plan.loads(kept.decode())
    except (OSError, UnicodeDecodeError, UntrustedError, PlanError) as error:
        raise PlanError(f"{path}: {error}") from error
    if plan is not None:
        logger.info("llmir: plan %s (llmir explain prints it)", path)
    return plan


def _prune(cache: Path) -> None:
    """Remove what was not used for long; a fault of the cache is told where something is read or kept."""
    for name in FOLDERS:
        with contextlib.suppress(OSError, UntrustedError):
            KeptFolder(cache / name).prune()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _file_digest(name: str) -> str | None:
    """A hash of the file called ``name``; None where there is none (a named workload)."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if name and path.is_file() else None


def model_classes(model: str, plugin_group: str) -> dict[str, Any]:
    """What may bring classes of a model that neither a framework's version nor a configuration names, by kind.

    The folder ``model`` may hold code of its own, and plugins of the framework, the entry points of ``plugin_group``,
    register classes in place of the framework's.
    """
    folder = Path(model)
    code = [path for path in folder.rglob("*.py") if path.is_file()] if folder.is_dir() else []
    plugins = metadata.entry_points(group=plugin_group)
    return {
        "code": files_digest(code, folder),
        "plugins": sorted(f"{plugin.value} {plugin.dist and plugin.dist.version}" for plugin in plugins),
    }


def source_digest(framework: str, root: Path = Path(llmir.__file__).parent) -> str:
    """A hash of the source below ``root``, so that an edited checkout never serves the plan of its past.

    Left out is what no plan of this framework depends on: commands, comparison, other frameworks' frontends. More than
    an import closure: plans are made by programs that a frontend starts by name, which no import statement shows.
    """
    files = (path for path in root.rglob("*.py") if _decides(path.relative_to(root).parts, framework))
    return files_digest(files, root)


def _decides(parts: tuple[str, ...], framework: str) -> bool:
    """Whether a plan of ``framework`` may depend on the file, given as the parts of its path inside llmir."""
    if parts[0] == "frontends" and len(parts) > 2:
        return parts[1] in ("common", framework)
    return parts[0] not in NOT_COMPILING
