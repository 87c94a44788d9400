"""From what a framework is about to serve to a plan: a file, the plan cache, or a child process that makes it.

Making a plan builds the framework's model classes, which want a process group of their own, and loads MLIR; a serving
process should have neither. With a plan in the cache, nothing but its JSON file is read.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmir.child import environment, python
from llmir.errors import LlmirError, PlanError
from llmir.frontends.common import plan_cache
from llmir.frontends.common.options import Options
from llmir.frontends.common.sharing_report import what_is_shared
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.targets.registry import is_gpu
from llmir.workload import Workload

if TYPE_CHECKING:
    from llmir.ir.bindings import ir

#: Seconds for making a plan, many times what the largest models take.
PATIENCE = 1800.0


class PlanningError(LlmirError):
    """The child process that makes a plan failed in a way that llmir has no better words for."""


def host_of(device: str) -> Target:
    """What computes attention on this machine: its processor, or where ``device`` is "gpu" its first GPU.

    Raises LlmirError where there is no such GPU, or none that llmir has kernels for.
    """
    return Target.named("gpu") if device == "gpu" else Target.detect()


def target_of(options: Options, host: Target) -> Target:
    """What a plan is to be made for: the target in ``options``, or ``host``.

    Raises LlmirError where ``host`` cannot run the target's kernels.
    """
    if missing := host.missing():
        raise LlmirError(missing)
    target = Target.named(options.target) if options.target and not options.plan else host
    if not target.runs_on(host):
        raise LlmirError(
            f"this machine cannot run kernels for target {options.target!r}, it has {host.isa}: leave out the target"
        )
    return target


def plan_for(
    facts: Mapping[str, Any],
    options: Options,
    make: Callable[[], Plan],
    logger: logging.Logger,
    host: Target | None = None,
) -> Plan:
    """The plan to serve: from the file in ``options``, the plan cache, or ``make``; says what it decided.

    ``facts``: everything in the framework's configuration that decides a plan (see plan_cache.plan_key), by name;
    among it "framework" (name and version), "model" and "world_size", as in ModelInfo, which a plan file must share.
    ``host``: what will run it, see :func:`host_of`; this machine's processor if not given. Raises LlmirError: whatever
    ``make`` raises, PlanError for a plan file that does not fit.
    """
    host = host or Target.detect()
    target = target_of(options, host)
    if options.plan:
        plan = Plan.read(Path(options.plan))
        _check_plan_file(plan, options.plan, facts, host)
        plan = plan if options.shares_prefixes else _without_sharing(plan)
    else:
        plan = plan_cache.get_or_make(plan_cache.plan_key(facts, options, target), make, logger)
    if unused := host.unused():
        logger.info("llmir: %s", unused)
    for decision in plan.decisions:
        if decision.subject == "KV cache":
            logger.info("llmir: %s (%s)", decision.decision, decision.reason)
    logger.info("llmir: %s", what_is_shared(plan))
    return plan


def check_carried(plan: Plan, device: str) -> None:
    """Raise PlanError unless ``device``, "cpu" or "gpu", of this machine runs a plan that came with a configuration.

    A configuration travels to other machines, and from one run to the next. Which GPU there is shows in the process
    that has it, where its runner looks.
    """
    if device == "cpu":
        plan.check_target(Target.detect().runnable)
    elif not is_gpu(plan.kernels[0].spec.isa):
        raise PlanError(
            f"the plan that came with the configuration was made for a machine {plan.target_fingerprint}, and this is "
            f"to be served on a GPU: leave the plan out, and llmir makes one"
        )


def _without_sharing(plan: Plan) -> Plan:
    """The plan with every request reading its cache alone."""
    return replace(plan, kernels=tuple(replace(k, policy=replace(k.policy, sharing=None)) for k in plan.kernels))


def _check_plan_file(plan: Plan, path: str, facts: Mapping[str, Any], host: Target) -> None:
    """Raise PlanError for a plan made for another machine, or by its record for another model or rank layout."""
    plan.check_target(host.runnable)
    found = {
        "framework": (f"{plan.framework} {plan.framework_version}", facts["framework"]),
        "model": (plan.model, facts["model"]),
        "tensor-parallel size": (plan.world_size, facts["world_size"]),
    }
    for what, (made_for, wanted) in found.items():
        if made_for != wanted:
            raise PlanError(f"{path} was made for {what} {made_for!r}, not {wanted!r}: make one with `llmir compile`")


def compile_module(module: ir.Module, options: Options, logger: logging.Logger, target: Target | None = None) -> Plan:
    """The plan of an imported model by the user's options, a CPU's kernels in the object cache; loads MLIR.

    ``target``: what :func:`target_of` gave; by the options and this machine's processor if not given.
    """
    from llmir import compiler

    return compiler.compile(
        module,
        target or target_of(options, Target.detect()),
        Workload.load(options.workload or None),
        compiler.Options(progress=lambda step: logger.info("llmir: %s", step)),
        prefix_sharing=options.shares_prefixes,
    )


def plan_in_child(module: str, payload: Any) -> Plan:
    """The plan that the module called ``module``, run as a program of its own, makes of ``payload``.

    The module hands :func:`serve_child` its function. Errors that it raises are raised here; PlanningError where the
    program gives none in time.
    """
    import cloudpickle  # the frameworks': model configurations with code from a hub pickle by value

    try:
        child = subprocess.run(
            python("-m", module),
            input=cloudpickle.dumps(payload),
            stdout=subprocess.PIPE,
            env=environment(os.environ),
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PlanningError(
            f"the process that compiles the model had no plan after {PATIENCE:.0f} s and was ended; its own messages "
            f"are above: start again when the machine has less to do, or serve without llmir"
        ) from error
    try:
        outcome = pickle.loads(child.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise PlanningError(
            f"the process that compiles the model ended with status {child.returncode} before it had a plan; "
            f"its own messages are above"
        ) from error
    if isinstance(outcome, LlmirError):
        raise outcome
    return Plan.loads(outcome)


def serve_child(make: Callable[[Any], Plan], logger: logging.Logger) -> None:
    """The other side of :func:`plan_in_child`: payload from standard input, plan or error to standard output."""
    # Standard output carries the answer alone; what libraries print there goes to standard error.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    outcome: Any
    try:
        outcome = make(pickle.load(sys.stdin.buffer)).dumps()
    except LlmirError as error:
        outcome = error
    except Exception as error:
        logger.exception("llmir: the model could not be compiled")
        outcome = PlanningError(f"the model could not be compiled: {type(error).__name__}: {error}; see the log above")
    with answer:
        pickle.dump(outcome, answer)
