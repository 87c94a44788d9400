"""From vLLM's configuration to a plan: out of the plan cache, or made in a child process.

Making a plan builds vLLM's model classes, which want a process group of their own, and loads MLIR; a serving process
should have neither. With a plan in the cache, nothing but its JSON file is read.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmir.errors import LlmirError, PlanError
from llmir.frontends.vllm import plan_cache, support
from llmir.frontends.vllm.options import Options
from llmir.plan import Plan
from llmir.target import Target
from llmir.workload import Workload

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Where a plan travels in vLLM's additional configuration, to every process vLLM starts.
PLAN_KEY = "llmir_plan"

# Below vLLM's logger, so that vLLM's log level and format hold for llmir's lines too.
logger = logging.getLogger("vllm.llmir")


class PlanningError(LlmirError):
    """The child process that makes a plan failed in a way that llmir has no better words for."""


def prepare(vllm_config: VllmConfig) -> None:
    """Check that llmir can serve this configuration, put the plan into it, and set the block size it chose.

    Called while vLLM's configuration is being completed, in any process, more than once. Raises LlmirError for
    whatever cannot be served.
    """
    support.check_config(vllm_config)
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        raise LlmirError(f"llmir needs vLLM's additional_config to be a dictionary, not {type(additional).__name__}")
    options = Options.read(additional, os.environ)
    carried = additional.get(PLAN_KEY)
    plan = plan_for(vllm_config, options) if carried is None else Plan.from_json(carried)

    for decision in plan.decisions:
        if decision.subject == "KV cache":
            logger.info("llmir: %s (%s)", decision.decision, decision.reason)
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != plan.block_size:
        raise PlanError(
            f"the plan is for blocks of {plan.block_size} tokens, and --block-size says {cache.block_size}: "
            f"leave out one of the two"
        )
    cache.block_size = plan.block_size
    # A new dictionary: the user's own may go into the next engine, with another model. And only what serving needs:
    # vLLM hashes it into the key of its torch.compile cache, so it must be the same when the same is decided again.
    vllm_config.additional_config = {**additional, PLAN_KEY: plan.for_serving().to_json()}


def plan_for(vllm_config: VllmConfig, options: Options) -> Plan:
    """The plan for this configuration, from the file in ``options``, the plan cache, or a child process.

    Raises LlmirError: whatever the compiler raised, PlanError for a plan file that does not fit.
    """
    host = Target.detect()
    if options.plan:
        plan = Plan.read(Path(options.plan))
        _check_plan_file(plan, options.plan, vllm_config, host)
        return plan
    target = Target.named(options.target) if options.target else host
    if not target.runs_on(host):
        raise LlmirError(f"this machine cannot run kernels for target {options.target!r}: it has {host.isa}")
    key = plan_cache.plan_key(vllm_config, options, target)
    return plan_cache.get_or_make(key, lambda: _plan_in_child(vllm_config, options), logger)


def compile_model(
    vllm_config: VllmConfig, target: Target | None = None, workload: Workload | None = None, **compiler_options: Any
) -> Plan:
    """Import the model and compile it, in this process, past the plan cache.

    Missing ``target`` and ``workload`` are this machine and the default workload; ``compiler_options`` are fields
    of ``llmir.compiler.Options``. Raises LlmirError.
    """
    from llmir import compiler
    from llmir.frontends.vllm.importer import import_module

    support.check_config(vllm_config)
    module = import_module(vllm_config)
    return compiler.compile(
        module, target or Target.detect(), workload or Workload.load(None), compiler.Options(**compiler_options)
    )


def _check_plan_file(plan: Plan, path: str, vllm_config: VllmConfig, host: Target) -> None:
    """Raise PlanError for a plan made for another machine, or by its record for another model or rank layout."""
    plan.check_target(host.fingerprint)
    facts = support.model_facts(vllm_config)
    found = {
        "framework": (f"{plan.framework} {plan.framework_version}", facts["framework"]),
        "model": (plan.model, facts["model"]),
        "tensor-parallel size": (plan.world_size, facts["world_size"]),
    }
    for what, (made_for, wanted) in found.items():
        if made_for != wanted:
            raise PlanError(f"{path} was made for {what} {made_for!r}, not {wanted!r}: make one with `llmir compile`")


def _plan_in_child(vllm_config: VllmConfig, options: Options) -> Plan:
    """Make a plan in a process of its own; errors that it raises are raised here."""
    import cloudpickle  # vLLM's: model configurations with code from a hub pickle by value

    logger.info(
        "llmir: compiling attention kernels for %s, once; later starts reuse them", vllm_config.model_config.model
    )
    child = subprocess.run(
        [sys.executable, "-m", "llmir.frontends.vllm.planning"],
        input=cloudpickle.dumps((vllm_config, options)),
        stdout=subprocess.PIPE,
        check=False,
    )
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


def _child() -> None:
    """Read a configuration from standard input, write a plan, or the error, to standard output."""
    # Standard output carries the answer alone; what libraries print there goes to standard error.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    outcome: Any
    try:
        vllm_config, options = pickle.load(sys.stdin.buffer)
        # Not asked for llmir, or building the configuration would ask for a plan.
        vllm_config.attention_config.backend = None
        plan = compile_model(
            vllm_config,
            Target.named(options.target) if options.target else None,
            Workload.load(options.workload or None),
            progress=lambda step: logger.info("llmir: %s", step),
        )
        outcome = plan.dumps()
    except LlmirError as error:
        outcome = error
    except Exception as error:
        logger.exception("llmir: the model could not be compiled")
        outcome = PlanningError(f"the model could not be compiled: {type(error).__name__}: {error}; see the log above")
    with answer:
        pickle.dump(outcome, answer)


if __name__ == "__main__":
    _child()
