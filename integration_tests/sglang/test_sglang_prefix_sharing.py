"""Real SGLang reading common prefixes once: the same answers, and figures of what it saved.

Each server serves a plan by which it always pays to share; one with the option that switches sharing off.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from common_prefixes import KV_BYTES, LARGEST_GROUP, REQUESTS, ROOM, Served, always_shared, largest_gap, serve
from engines import one_cpu_a_rank
from sglang.srt.server_args import ServerArgs

from llmir.frontends.common import planning as common
from llmir.frontends.sglang import planning

#: Nats by which a float32 answer of one token may differ.
NOISE = 2e-3
JOBS = ["prefixes", "extend", "groups", "crowd"]
SERVERS: dict[str, dict[str, Any]] = {"on": {}, "off": {}, "two ranks": {"tp_size": 2}}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 16,
    "max_total_tokens": ROOM,
    "chunked_prefill_size": 256,
    "enable_mixed_chunk": True,
    "schedule_conservativeness": 0.01,
    "attention_backend": "llmir",
    "device": "cpu",
}

ServedBy = Callable[[str], Served]


@pytest.fixture(scope="module")
def served(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> ServedBy:
    """``served("two ranks")``: by the server called so; each is started once."""
    cache = tmp_path_factory.mktemp("cache")

    def start(name: str) -> Served:
        folder = tmp_path_factory.mktemp("server")
        engine = ENGINE | SERVERS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMIR_CACHE", str(cache))
            patch.setattr(common, "plan_in_child", lambda module, payload: planning._make_plan(payload))
            server_args = ServerArgs(model_path=smollm2, **engine)
            server_args.resolve_once()
        plan = folder / "plan.json"
        always_shared(planning.plan_of(server_args)).write(plan)
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", smollm2, "--enable-metrics"]
        for option, value in engine.items():
            flag = f"--{option.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        ranks = engine.get("tp_size", 1)
        environment = {
            **os.environ,
            "LLMIR_CACHE": str(cache),
            "LLMIR_PLAN": str(plan),
            "LLMIR_PREFIX_SHARING": "off" if name == "off" else "on",
            "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8",  # more requests are let in than there will be room for
            "SGLANG_CPU_OMP_THREADS_BIND": one_cpu_a_rank(ranks),
        }
        return serve(command, environment, folder, smollm2, JOBS if ranks == 1 else JOBS[:3])

    return functools.cache(start)


@pytest.mark.parametrize("job", JOBS)
def test_answers_are_those_without_sharing(served: ServedBy, job: str) -> None:
    assert largest_gap(served("on").answers[job], served("off").answers[job]) < NOISE


@pytest.mark.parametrize("job", JOBS[:3])
def test_so_are_those_of_two_ranks(served: ServedBy, job: str) -> None:
    assert largest_gap(served("two ranks").answers[job], served("off").answers[job]) < NOISE


def test_the_log_says_whether_and_how_much_is_shared(served: ServedBy) -> None:
    on, off = served("on").log, served("off").log
    assert "prefix sharing is on: 30 of 30 layers" in on
    assert "prefixes were read once" in on
    assert "prefix sharing is off" in off
    assert "prefixes were read once" not in off


@pytest.mark.parametrize(
    ("name", "job"),
    [("on", "extend"), ("on", "groups"), ("on", "crowd"), ("two ranks", "extend"), ("two ranks", "groups")],
)
def test_the_endpoint_counts_what_was_shared(served: ServedBy, name: str, job: str) -> None:
    requests, kv_bytes = served(name).shared[job]
    assert requests > 0
    assert kv_bytes > 0


def test_without_sharing_the_endpoint_counts_nothing(served: ServedBy) -> None:
    metrics = served("off").metrics
    assert (metrics[REQUESTS], metrics[KV_BYTES]) == (0, 0)
    assert metrics["sglang:num_requests_total"] > 0


@pytest.mark.parametrize("name", ["on", "two ranks"])
def test_several_groups_share_in_one_step(served: ServedBy, name: str) -> None:
    requests, _ = served(name).shared["groups"]
    answered = served(name).answers["groups"]
    steps = len(answered[0]["logprobs"]["tokens"])
    assert requests > LARGEST_GROUP * steps
    assert requests <= len(answered) * steps, "a request counts once a step, on one rank"


def test_retracted_requests_come_back_to_their_prefix(served: ServedBy) -> None:
    assert "Retract requests" in served("on").log
