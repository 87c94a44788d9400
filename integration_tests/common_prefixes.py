"""Requests with common prefixes, asked of a server of either framework, and what it says about sharing them."""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import answer_gaps
from servers import serving

from llmir.ir.kernel_spec import SharingCosts
from llmir.plan import Plan

START_SECONDS = 400
TEXT = Path(__file__).parents[1] / "LICENSE"
#: Costs by which it always pays to share, so that a test does not depend on the machine.
ALWAYS = SharingCosts(
    most_rows=64,
    least_tokens=32,
    read_key=1.0,
    cached_key=((32, 1.0),),
    tile_key=0.01,
    decode_rows=1000,
    decode_row_key=1.0,
    row=0.0,
    margin=1.0,
)
REQUESTS = "llmir_shared_prefix_requests_total"
KV_BYTES = "llmir_shared_prefix_kv_bytes_not_read_total"

PREFIXES, PREFIX = 4, 384
#: Requests of one prefix, of those that are asked together in several groups.
LARGEST_GROUP = 4
#: Tokens of KV cache to serve with: the crowd's answers do not fit, so some of it has to wait and come back.
ROOM = 3072
CROWD, CROWD_TOKENS = 20, 128
#: Tokens of a prompt that takes long enough for others to arrive meanwhile: some tenths of a second.
LONG_PROMPT = 600
Prompts = list[list[int]]


def always_shared(plan: Plan) -> Plan:
    """The plan with every prefix shared, as far as requests have few new tokens."""
    kernels = (replace(kernel, policy=replace(kernel.policy, sharing=ALWAYS)) for kernel in plan.kernels)
    return replace(plan, kernels=tuple(kernels))


def jobs(tokens: list[int]) -> dict[str, tuple[Prompts, int]]:
    """Prompts out of a text, and how many tokens to answer with; asked one job after the other."""
    prefixes = [tokens[PREFIX * i : PREFIX * (i + 1)] for i in range(PREFIXES)]
    rest = tokens[PREFIX * PREFIXES :]
    document = prefixes[0] + rest[:96]

    def own(number: int, length: int) -> list[int]:
        return rest[100 + 20 * number :][:length]

    # Requests arrive one by one and may be served as they come; those behind a long prompt are served together.
    long_prompt = rest[-LONG_PROMPT:]
    # Members of a group do not lie side by side, and few groups part where a step takes some of what has arrived.
    extended = [p + own(i, 2 + i) for i, p in enumerate(prefixes[:2] * 2 + prefixes[2:] * 2)]
    pairs = [prefix + own(number, 1 + 7 * number) for number, prefix in enumerate(prefixes * 2)]
    return {
        # Into the cache: what is computed in one step is not shared yet.
        "prefixes": ([*prefixes, document], 1),
        # Several new tokens over a cached prefix, in one step; the longest reads its prefix alone.
        "extend": ([long_prompt, *extended, prefixes[1] + own(20, 200)], 1),
        # A group of each prefix; one of them has a group within; and one request on its own.
        "groups": ([*pairs, document + own(9, 3), own(11, 50), document + own(10, 8)], 24),
        "crowd": ([prefixes[0] + own(number, 40) for number in range(CROWD)], CROWD_TOKENS),
    }


@dataclass(frozen=True)
class Served:
    """What a server answered, counted and logged."""

    answers: dict[str, list[Any]]
    """By job, in the order of its prompts."""
    shared: dict[str, tuple[float, float]]
    """By job: requests grouped, bytes of keys and values not read."""
    metrics: dict[str, float]
    """When all is done; each the sum over its labels."""
    log: str


def serve(command: list[str], environment: dict[str, str], folder: Path, model: str, names: list[str]) -> Served:
    """Start a server, do the jobs called ``names``, and stop it."""
    from transformers import AutoTokenizer

    todo = jobs(AutoTokenizer.from_pretrained(model)(2 * TEXT.read_text())["input_ids"])
    answers, shared = {}, {}
    log = folder / "server.log"
    with serving(command, environment, log, START_SECONDS) as (address, _):
        before = _metrics(address)
        for name in names:
            answers[name] = _complete(address, model, *todo[name])
            after = _metrics(address)
            shared[name] = (after[REQUESTS] - before[REQUESTS], after[KV_BYTES] - before[KV_BYTES])
            before = after
    return Served(answers, shared, before, log.read_text())


def largest_gap(ours: list[Any], theirs: list[Any]) -> float:
    """Of what two servers answered to one job: see :func:`answer_gaps.largest_gap`."""
    return answer_gaps.largest_gap([_tokens(choice) for choice in ours], [_tokens(choice) for choice in theirs])


def _tokens(choice: Any) -> list[answer_gaps.Token]:
    found = choice["logprobs"]
    return list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))


def _complete(address: str, model: str, prompts: Prompts, length: int) -> list[Any]:
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 5,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
        return sorted(json.load(response)["choices"], key=lambda choice: choice["index"])


def _metrics(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
