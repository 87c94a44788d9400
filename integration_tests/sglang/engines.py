"""Real engines, each in a process of its own, and what their answers have in common."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import answer_gaps
import pytest

ANSWER = Path(__file__).parent / "answer.py"
#: Seconds for an engine to start and to answer everything, on a busy machine.
PATIENCE = 600

_CPUS = sorted(os.sched_getaffinity(0))


def one_cpu_a_rank(ranks: int) -> str:
    """What SGLang binds its ranks to; of several processes that run tests, each begins with another processor."""
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(_CPUS)
    return "|".join(str((_CPUS * (ranks + 1))[first + rank]) for rank in range(ranks))


@dataclass(frozen=True)
class Answers:
    """What ``answer.py`` wrote, and what the engine logged."""

    jobs: dict[str, Any]
    log: str

    def tokens(self, job: str) -> list[list[answer_gaps.Token]]:
        """Of each request the tokens of its answer."""
        found = []
        for request in self.jobs[job]:
            meta = request["meta_info"]
            likeliest = [{token: logprob for logprob, token, _ in top} for top in meta["output_top_logprobs"]]
            chosen = meta["output_token_logprobs"]
            found.append([(token, p, top) for (p, token, _), top in zip(chosen, likeliest, strict=True)])
        return found

    def scores(self) -> list[float]:
        """Log-probabilities of all tokens of the given texts but each one's first."""
        texts = [request["meta_info"]["input_token_logprobs"][1:] for request in self.jobs["scores"]]
        return [logprob for text in texts for logprob, *_ in text]

    def meta(self, job: str, name: str) -> list[Any]:
        """What SGLang notes about each request under ``name``."""
        return [request["meta_info"][name] for request in self.jobs[job]]


def ask(model: str, jobs: str, arguments: dict[str, Any], folder: Path, **environment: str) -> Answers:
    """Start an engine with ``arguments``, let it do ``jobs``, and wait until all its processes are gone."""
    output, log = folder / "answers.json", folder / "engine.log"
    command = [sys.executable, str(ANSWER), model, json.dumps(arguments), jobs, str(output)]
    with log.open("w") as stream:
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT, timeout=PATIENCE
        )
    assert done.returncode == 0, log.read_text()
    return Answers(json.loads(output.read_text()), log.read_text())


def make_plan_here(model: str, arguments: dict[str, Any]) -> None:
    """Put the plan of an engine into the cache from this process, which has imported everything already."""
    from sglang.srt.server_args import ServerArgs

    from llmir.frontends.common import planning as common
    from llmir.frontends.sglang import planning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plan_in_child", lambda module, payload: planning._make_plan(payload))
        ServerArgs(model_path=model, device="cpu", **arguments).resolve_once()


def largest_gap(ours: Answers, theirs: Answers, job: str) -> float:
    """Of what two engines answered to one job: see :func:`answer_gaps.largest_gap`."""
    return answer_gaps.largest_gap(ours.tokens(job), theirs.tokens(job))


def mean_error(scores: list[float], exact: list[float]) -> float:
    """Mean absolute difference of log-probabilities, in nats."""
    return fmean(abs(a - b) for a, b in zip(scores, exact, strict=True))
