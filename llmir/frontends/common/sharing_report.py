"""What a user can see of prefix sharing: a line at the start, a line every now and then, and three counters.

The counters are prometheus_client's, as the frameworks' own are, in the process that computes attention:

- ``llmir_shared_prefix_requests_total``: requests whose prefix was read together with others', summed over steps;
  counted by the first rank alone, and for each group of layers that has a block table of its own;
- ``llmir_shared_prefix_kv_bytes_not_read_total``: bytes of keys and values that were not read again; each rank counts
  those of its own heads and layers, and the endpoint adds the ranks up;
- ``llmir_shared_prefix_blind_steps_total``: steps that shared nothing because nobody could tell who shares what, or
  because the buffers of a GPU had no room for so many parts; by the first rank too.

A metrics endpoint sees them where its framework lets it see other processes than its own, which is prometheus_client's
PROMETHEUS_MULTIPROC_DIR:

- SGLang sets it with ``--enable-metrics``;
- vLLM sets it with ``--api-server-count`` above 1, and follows the user's own: an empty folder. Otherwise its endpoint
  shows the API server's process alone, and the log has these figures. Where the engine runs in the user's process
  (VLLM_ENABLE_V1_MULTIPROCESSING=0) they are in prometheus_client's default registry.

llmir never sets it: it changes how every other metric is kept.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmir.plan import Plan

if TYPE_CHECKING:
    from llmir.runtime.layers import SharingCount

#: Seconds between two lines in the log, as between the frameworks' own.
LOG_INTERVAL = 10.0


def what_is_shared(plan: Plan) -> str:
    """A sentence: whether requests read a common prefix once, in how many layers, and from how many tokens on."""
    shared = [kernel for kernel in plan.kernels if kernel.policy.sharing is not None]
    if not shared:
        return "prefix sharing is off: every request reads its own part of the KV cache"
    least = min(kernel.policy.sharing.least_tokens for kernel in shared if kernel.policy.sharing is not None)
    layers, all_layers = (sum(len(kernel.layers) for kernel in kernels) for kernels in (shared, plan.kernels))
    return (
        f"prefix sharing is on: {layers} of {all_layers} layers read a prefix that requests have in common once, from "
        f"{least} tokens on, where that costs less"
    )


class SharingReport:
    """Reports what one group of layers saves by sharing."""

    def __init__(self, count: SharingCount, first_rank: bool, logger: logging.Logger):
        """``count`` goes on counting; ``first_rank``: whether this is the first of the processes with one batch."""
        self._count = count
        self._first_rank = first_rank
        self._logger = logger
        self._counters = _counters(logger)
        self._counted = self._logged = replace(count)
        self._next_line = 0.0
        self._said_blind = False

    def update(self) -> None:
        """Report what was saved since the last call; made after each step is begun.

        A step that shared nothing costs a comparison; one that did costs two additions to counters, some microseconds.
        """
        count, counted = self._count, self._counted
        if (count.steps, count.steps_without_room) == (counted.steps, counted.steps_without_room):
            return
        self._counted = replace(count)
        if count.steps_without_room > counted.steps_without_room:
            self.blind("what they share is in more parts than the GPU's buffers have room for")
        if count.steps == counted.steps:
            return
        if self._counters:
            requests, kv_bytes, _ = self._counters
            requests.inc(count.requests - counted.requests if self._first_rank else 0)
            kv_bytes.inc(count.kv_bytes - counted.kv_bytes)
        if self._first_rank and time.monotonic() >= self._next_line:
            self._log()

    def blind(self, reason: str) -> None:
        """Report that a step shares nothing though its plan says it should; the log has the ``reason`` once."""
        if not self._first_rank:
            return
        if not self._said_blind:
            self._logger.warning("llmir: requests read their prefixes by themselves: %s", reason)
            self._said_blind = True
        if self._counters:
            self._counters[2].inc()

    def _log(self) -> None:
        """One line about the steps since the last one."""
        count, logged = self._count, self._logged
        self._logger.info(
            "llmir: prefixes were read once in %d steps, for %.1f requests a step; keys and values not read again: "
            "%.3f GB, %.3f GB since the start",
            count.steps - logged.steps,
            (count.requests - logged.requests) / (count.steps - logged.steps),
            (count.kv_bytes - logged.kv_bytes) / 1e9,
            count.kv_bytes / 1e9,
        )
        self._logged = replace(count)
        self._next_line = time.monotonic() + LOG_INTERVAL


@functools.cache
def _counters(logger: logging.Logger) -> tuple[Any, Any, Any] | None:
    """The counters (requests, bytes, blind steps) of this process; None, with a warning, where they cannot be kept."""
    from prometheus_client import Counter  # the frameworks'; they set its folder before anything imports it

    try:
        return (
            Counter("llmir_shared_prefix_requests", "Requests whose prefix was read with others', summed over steps."),
            Counter("llmir_shared_prefix_kv_bytes_not_read", "Bytes of keys and values that were not read again."),
            Counter("llmir_shared_prefix_blind_steps", "Steps that could not share a prefix."),
        )
    except OSError as error:
        logger.warning("llmir: prefix sharing is not in the metrics: prometheus_client has no folder (%s)", error)
        return None
