"""Whether the plans of all ranks of an engine go together: every node makes its own, from its own measurements.

Within a node the plan travels with the framework's configuration. Nodes that measured themselves differently may have
chosen other blocks; the first prefix that is found in one's cache and not in another's would then end them all.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from llmir.errors import PlanError
from llmir.plan import Plan


def check_agreement(plan: Plan, gather: Callable[[Any], list[Any]], logger: logging.Logger) -> None:
    """Compare this rank's plan with those of the others; all of them must call this.

    ``gather`` gives what every rank gave, in the order of ranks. Raises PlanError, on every rank, where blocks have
    unequal sizes. Kernels may differ, as processors do: that costs equal roundings alone, and is logged.
    """
    ranks = gather((socket.gethostname(), plan.block_size, tuple(kernel.spec for kernel in plan.kernels)))
    first_host, block_size, kernels = ranks[0]
    for rank, (host, size, own_kernels) in enumerate(ranks):
        if size != block_size:
            raise PlanError(
                f"rank {rank} on {host} has a plan for blocks of {size} tokens, rank 0 on {first_host} one for blocks "
                f"of {block_size}: each node made its own. Give all nodes the same size with --block-size (vLLM) or "
                f"--page-size (SGLang), or one plan file: `llmir compile` writes it, LLMIR_PLAN names it"
            )
        if own_kernels != kernels:
            difference = f"rank {rank} on {host} has other kernels than rank 0 on {first_host}"
            logger.warning("llmir: %s: their roundings differ", difference)
