"""From vLLM's configuration to a configuration that carries llmir's plan."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from llmir.errors import LlmirError, PlanError
from llmir.frontends.common import planning
from llmir.frontends.common.options import Options
from llmir.frontends.vllm import support
from llmir.frontends.vllm.versions import VERSIONS
from llmir.plan import Plan
from llmir.targets.machine import Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Where a plan travels in vLLM's additional configuration, to every process vLLM starts.
PLAN_KEY = "llmir_plan"
#: How options are handed over, for messages.
WHERE = """--additional-config '{"llmir": {"workload": "chat"}}'"""

# Below vLLM's logger, so that vLLM's log level and format hold for llmir's lines too.
logger = logging.getLogger("vllm.llmir")


def prepare(vllm_config: VllmConfig) -> None:
    """Check that llmir can serve this configuration, put the plan into it, and set the block size it chose.

    Called while vLLM's configuration is being completed, in any process, more than once. Raises LlmirError for
    whatever cannot be served.
    """
    device = support.device_of(vllm_config)
    VERSIONS.check(device)
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        raise LlmirError(f"llmir needs vLLM's additional_config to be a dictionary, not {type(additional).__name__}")
    support.check_block_size(vllm_config)
    options = Options.read(additional.get("llmir", {}), os.environ, WHERE)
    carried = additional.get(PLAN_KEY)
    if carried is None:
        host = planning.host_of(device)
        target = planning.target_of(options, host)
        support.check_config(vllm_config, target.isa)
        plan = _plan_for(vllm_config, options, host, target)
    else:
        plan = Plan.from_json(carried)
        planning.check_carried(plan, device)
        support.check_config(vllm_config, plan.kernels[0].spec.isa)
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


def _plan_for(vllm_config: VllmConfig, options: Options, host: Target, target: Target) -> Plan:
    """The plan for this configuration; raises LlmirError."""

    def make() -> Plan:
        model = vllm_config.model_config.model
        logger.info("llmir: compiling attention kernels for %s, once; later starts reuse them", model)
        return planning.plan_in_child(__name__, (vllm_config, options, target))

    return planning.plan_for(facts(vllm_config, target.isa), options, make, logger, host)


def facts(vllm_config: VllmConfig, isa: str) -> dict[str, Any]:
    """Everything that decides a plan: the configuration, and what vLLM's layers ask of the environment."""
    from vllm import envs

    of_environment = getattr(envs, "compile_factors", None)  # a vLLM that knows which variables decide something has it
    return {**support.plan_facts(vllm_config, isa), "environment": of_environment() if of_environment else None}


def _make_plan(payload: tuple[VllmConfig, Options, Target]) -> Plan:
    """Import the model and compile it, in the child process."""
    vllm_config, options, target = payload
    _set_up_as_a_worker(vllm_config)
    from llmir.frontends.vllm.importer import import_module

    # Not asked for llmir, or building the configuration would ask for a plan.
    vllm_config.attention_config.backend = None
    return planning.compile_module(import_module(vllm_config, isa=target.isa), options, logger, target)


def _set_up_as_a_worker(vllm_config: VllmConfig) -> None:
    """Know the model classes that one of vLLM's workers knows: those of plugins, and of a user's own worker class."""
    from vllm.plugins import load_general_plugins
    from vllm.utils.import_utils import resolve_obj_by_qualname

    load_general_plugins()
    parallel = vllm_config.parallel_config
    for name in (parallel.worker_cls, parallel.worker_extension_cls):
        if "." in name and not name.startswith("vllm."):
            resolve_obj_by_qualname(name)


if __name__ == "__main__":
    planning.serve_child(_make_plan, logger)
