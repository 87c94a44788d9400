"""Real vLLM reading common prefixes once: the same answers, and figures of what it saved.

Each server serves the same plan, by which it always pays to share; some with the option that switches sharing off.
"""

import functools
import json
import os
import sys
from collections.abc import Callable

import pytest
from common_prefixes import KV_BYTES, LARGEST_GROUP, REQUESTS, ROOM, Served, always_shared, largest_gap, serve
from vllm.engine.arg_utils import EngineArgs

from llmir import compiler
from llmir.frontends.vllm import plugin
from llmir.frontends.vllm.importer import import_module
from llmir.targets.machine import Target
from llmir.workload import DEFAULT

LAYERS, KV_HEADS, HEAD_SIZE = 30, 3, 64
BYTES = {"bfloat16": 2, "float32": 4}
#: Nats by which an answer of one token may differ.
NOISE = {"bfloat16": 0.6, "float32": 2e-3}
#: Answers are exact in float32. A processor without AVX512 multiplies bfloat16 by emulation: it is asked little.
JOBS = {"float32": ["prefixes", "extend", "groups", "crowd"], "bfloat16": ["prefixes"]}

ServedBy = Callable[[str, str], Served]


@pytest.fixture(scope="module")
def served(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> ServedBy:
    """``served("float32", "off")``: by a server of that dtype with that option; each is started once."""
    cache = tmp_path_factory.mktemp("cache")

    def start(dtype: str, sharing: str) -> Served:
        folder = tmp_path_factory.mktemp("server")
        counters = folder / "counters"
        counters.mkdir()
        engine = {"dtype": dtype, "block_size": 32, "max_model_len": 1024}
        plan = folder / "plan.json"
        plugin.register()
        module = import_module(EngineArgs(model=smollm2, **engine).create_engine_config())
        options = compiler.Options(calibrate=False, cache=cache)
        always_shared(compiler.compile(module, Target.detect(), DEFAULT, options)).write(plan)
        room = ROOM * LAYERS * KV_HEADS * HEAD_SIZE * 2 * BYTES[dtype]
        arguments = {
            "model": smollm2,
            **{name.replace("_", "-"): value for name, value in engine.items()},
            "kv-cache-memory-bytes": room,
            "attention-backend": "LLMIR",
            "additional-config": json.dumps({"llmir": {"plan": str(plan), "prefix_sharing": sharing}}),
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        environment = {
            **os.environ,
            "LLMIR_CACHE": str(cache),
            "PROMETHEUS_MULTIPROC_DIR": str(counters),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        return serve(command, environment, folder, smollm2, JOBS[dtype])

    return functools.cache(start)


@pytest.mark.parametrize(("dtype", "job"), [(dtype, job) for dtype in JOBS for job in JOBS[dtype]])
def test_answers_are_those_without_sharing(served: ServedBy, dtype: str, job: str) -> None:
    gap = largest_gap(served(dtype, "on").answers[job], served(dtype, "off").answers[job])
    assert gap < NOISE[dtype]


def test_the_log_says_whether_and_how_much_is_shared(served: ServedBy) -> None:
    on, off = served("float32", "on").log, served("float32", "off").log
    assert f"prefix sharing is on: {LAYERS} of {LAYERS} layers" in on
    assert "prefixes were read once" in on
    assert "prefix sharing is off" in off
    assert "prefixes were read once" not in off


@pytest.mark.parametrize("job", ["extend", "groups", "crowd"])
def test_the_endpoint_counts_what_was_shared(served: ServedBy, job: str) -> None:
    requests, kv_bytes = served("float32", "on").shared[job]
    assert requests > 0
    assert kv_bytes > 0


def test_without_sharing_the_endpoint_counts_nothing(served: ServedBy) -> None:
    metrics = served("float32", "off").metrics
    assert (metrics[REQUESTS], metrics[KV_BYTES]) == (0, 0)
    assert metrics["vllm:request_success_total"] > 0


def test_several_groups_share_in_one_step(served: ServedBy) -> None:
    on = served("float32", "on")
    requests, _ = on.shared["groups"]
    answered = on.answers["groups"]
    steps = len(answered[0]["logprobs"]["tokens"])
    assert requests > LARGEST_GROUP * steps
    assert requests <= len(answered) * steps, "a request counts once a step"


def test_preempted_requests_come_back_to_their_prefix(served: ServedBy) -> None:
    assert served("float32", "on").metrics["vllm:num_preemptions_total"] > 0
