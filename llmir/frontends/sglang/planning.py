"""From SGLang's server arguments to server arguments that carry llmir's plan."""

from __future__ import annotations

import logging
import os
from typing import Any

from llmir.errors import PlanError
from llmir.frontends.common import planning
from llmir.frontends.common.options import Options
from llmir.frontends.sglang import reading, support
from llmir.frontends.sglang.versions import VERSIONS
from llmir.plan import Plan
from llmir.targets.machine import Target

#: Where a plan travels on SGLang's server arguments, to every process SGLang starts. SGLang keeps its own notes in
#: attributes that begin so, and they are pickled along.
PLAN_ATTRIBUTE = "_llmir_plan"
#: How options are handed over, for messages: SGLang has no argument for plugins.
WHERE = "LLMIR_WORKLOAD=chat python -m sglang.launch_server ..."

# Below SGLang's logger, so that its log level and format hold for llmir's lines too.
logger = logging.getLogger("sglang.llmir")


def prepare(server_args: Any) -> None:
    """Check that llmir can serve these arguments, put the plan on them, and decide the page size.

    Called once, while SGLang resolves its arguments and before it starts processes. Raises LlmirError for whatever
    cannot be served.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view, model = resolving_view(server_args), model_config_of(server_args)
    options = Options.read({}, os.environ, WHERE)
    device = "gpu" if support.on_gpu(view) else "cpu"
    VERSIONS.check(device)
    host = planning.host_of(device)
    target = planning.target_of(options, host)
    support.check_arguments(view, model, target.isa)
    fields = {**server_args._raw_input, "device": view.device}

    def make() -> Plan:
        logger.info("llmir: compiling attention kernels for %s, once; later starts reuse them", view.model_path)
        return planning.plan_in_child(__name__, (fields, options, target))

    plan = planning.plan_for(support.plan_facts(view, model, fields), options, make, logger, host)
    if view.page_size is not None and view.page_size != plan.block_size:
        raise PlanError(
            f"the plan is for pages of {plan.block_size} tokens, and --page-size says {view.page_size}: "
            f"leave out one of the two"
        )
    setattr(server_args, PLAN_ATTRIBUTE, plan.for_serving().to_json())
    graphs = view.cuda_graph_config if support.on_gpu(view) else _no_graphs(view.cuda_graph_config)
    declare_resolution(server_args, "llmir", page_size=plan.block_size, cuda_graph_config=graphs)


def _no_graphs(graphs: Any) -> Any:
    """As for SGLang's own CPU backends: a step is run, not replayed."""
    from sglang.srt.arg_groups.cuda_graph_hook import Backend, Phase, with_phase

    for phase in (Phase.PREFILL, Phase.DECODE):
        graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
    return graphs


def plan_of(server_args: Any) -> Plan:
    """The plan on SGLang's server arguments."""
    plan = getattr(server_args, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise PlanError(
            "SGLang's server arguments carry no llmir plan: they were resolved where the llmir plugin was not loaded; "
            "start SGLang through its launcher or Engine, with llmir among SGLANG_PLUGINS if that is set"
        )
    return Plan.from_json(plan)


def _make_plan(payload: tuple[dict[str, Any], Options, Target]) -> Plan:
    """Import the model and compile it, in the child process."""
    fields, options, target = payload
    with reading.as_on_a_cpu():
        from sglang.srt.plugins import load_plugins

        load_plugins()  # what they register or replace, a scheduler has too
        from llmir.frontends.sglang.importer import configure, import_module

        module = import_module(configure(**fields), isa=target.isa)
    return planning.compile_module(module, options, logger, target)


if __name__ == "__main__":
    planning.serve_child(_make_plan, logger)
