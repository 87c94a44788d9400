"""Serves a small random model of each architecture with a framework's attention and with llmir's, and compares answers.

    python tools/zoo.py vllm
    python tools/zoo.py sglang --json zoo.json --markdown docs/models.md
    python tools/zoo.py vllm --only MixtralForCausalLM OPTForCausalLM --logs logs

Run it with the Python of the framework's environment. The architectures are those of tools/sweep_architectures.py.
Both sides serve the same float32 weights and answer the same requests: prefills in chunks beside decode steps, prompts
that begin in the cache, and each prompt alone. The table has the largest difference between any two log-probabilities
of the sides, in nats, beside the largest between the framework's own answers to a prompt together with others and
alone. The plan and either side are made in processes of their own: one that ends is a row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import zoo_sides
from sweep_architectures import CRASHED, ENVIRONMENT, NOT_BUILT, NoAnswer, answer_of_child, architectures, preload
from zoo_markdown import write_table
from zoo_models import write_model
from zoo_sides import Answer

#: Seconds for the plan and for each side.
PATIENCE = 120.0
#: Nats by which the sides may differ, or how often the framework's own difference: float32 sums in another order.
NOISE, OWN_NOISE = 2e-3, 10
SAME, DIFFERENT, REFUSED, NOT_SERVED = "same", "DIFFERENT", "refused", "not served by the framework"

#: Why a framework's own answers are not the model's, so that the sides differ.
FRAMEWORKS_OWN = {
    ("sglang", "Gemma2ForCausalLM"): "SGLang's torch_native attention leaves out the soft cap",
}


@dataclass
class Row:
    """What became of one architecture in one framework."""

    architecture: str
    framework: str
    outcome: str
    level: str = ""
    opaque: dict[str, int] = field(default_factory=dict)
    difference: float | None = None
    """Between the framework's attention and llmir's: nats."""
    own: float | None = None
    """Between two runs of the framework's own."""
    words: str = ""
    """Where answers differ, why there are none, or why nothing but attention was imported."""


def planned(framework: str, model: str, plan: str) -> tuple[str, Any]:
    """What :func:`zoo_sides.planned` finds, or an outcome and llmir's sentence."""
    from llmir.errors import LlmirError
    from llmir.frontends.common.building import ImportModelError
    from llmir.frontends.common.offline import ModelError

    try:
        return "", zoo_sides.planned(framework, model, plan)
    except (ImportModelError, ModelError) as error:
        return NOT_BUILT, str(error)
    except LlmirError as error:
        return REFUSED, str(error)


def served(framework: str, model: str, plan: str | None, started: str) -> tuple[str, Any]:
    """What :func:`zoo_sides.answers` finds, or an outcome and llmir's sentence."""
    from llmir.errors import LlmirError

    try:
        return "", zoo_sides.answers(framework, model, plan, started)
    except LlmirError as error:
        return REFUSED, str(error)


def row_of(framework: str, model_type: str, architecture: str, logs: Path | None) -> Row:
    """Plan and serve one architecture on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        return _row_of(Row(architecture, framework, ""), model_type, Path(folder), logs)


def _row_of(row: Row, model_type: str, folder: Path, logs: Path | None) -> Row:
    model, plan = folder / "model", folder / "plan.json"
    model.mkdir()

    def child(step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        log = str(logs / f"{row.framework}-{row.architecture}-{step}.log") if logs else os.devnull
        return answer_of_child(work, row.framework, str(model), *arguments, patience=PATIENCE, log=log)

    def serve(step: str, plan: str | None) -> Any:
        started = folder / f"{step}.started"
        try:
            return child(step, served, plan, str(started))
        except NoAnswer as error:
            raise NoAnswer(f"{'while serving' if started.exists() else 'at start'}: {error}") from error

    row.outcome = NOT_BUILT
    try:
        write_model(model, model_type, row.architecture)
        row.outcome = CRASHED
        row.outcome, found = child("plan", planned, str(plan))
        if row.outcome:
            row.words = found
            return row
        row.level, row.opaque, said = found
        row.outcome = NOT_SERVED
        theirs = serve("own", None)[1]
        row.outcome = CRASHED
        row.outcome, ours = serve("llmir", str(plan))
        if row.outcome:
            row.words = ours
            return row
        row = compare(row, ours, theirs)
        row.words = row.words or (said if row.level == "attention" else "")
        return row
    except Exception as error:
        row.words = str(error)
        return row


def compare(row: Row, ours: list[Answer], theirs: list[Answer]) -> Row:
    """The row with what the two sides' answers differ by; the second half repeats the first, each prompt alone."""
    half = len(theirs) // 2
    pairs = [difference(mine, its) for mine, its in zip(ours, theirs, strict=True)]
    row.difference = max(nats for nats, _ in pairs)
    row.own = max(difference(a, b)[0] for a, b in zip(theirs[:half], theirs[half:], strict=True))
    bound = max(NOISE, OWN_NOISE * row.own)
    wrong = [
        f"request {number}: {words or f'{nats:.0e}'}"
        for number, (nats, words) in enumerate(pairs)
        if words or nats > bound
    ]
    row.outcome = DIFFERENT if wrong else SAME
    known = FRAMEWORKS_OWN.get((row.framework, row.architecture))
    row.words = "; ".join([known, *wrong] if wrong and known else wrong)
    return row


def difference(mine: Answer, its: Answer) -> tuple[float, str]:
    """The largest difference in nats as long as the greedy tokens are the same, and where they are not."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine.tokens, its.tokens, strict=True)))
    pairs = [
        *zip(mine.prompt_logprobs, its.prompt_logprobs, strict=False),
        *zip(mine.logprobs[:same], its.logprobs[:same], strict=True),
    ]
    words = "" if same == len(its.tokens) else f"other tokens from {same} on"
    largest = max((abs(a - b) for a, b in pairs), default=0.0)
    return (math.inf, "not a number") if any(math.isnan(a - b) for a, b in pairs) else (largest, words)


def zoo(framework: str, only: list[str], logs: Path | None) -> Iterator[Row]:
    """The rows of a framework's architectures, or of those in ``only``; prints each."""
    preload(framework)
    kinds = architectures(framework)
    if unknown := set(only) - set(kinds):
        raise SystemExit(f"{framework} and transformers' defaults have no {', '.join(sorted(unknown))}")
    for architecture in only or kinds:
        row = row_of(framework, kinds[architecture], architecture, logs)
        numbers = "" if row.difference is None else f"{row.difference:.1e} / {row.own:.1e} "
        print(f"{row.architecture:34} {row.outcome:10} {row.level:9} {numbers}{row.words[:200]}", flush=True)
        yield row


def merged(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``new`` rows, and of those ``kept`` the ones of other architectures and frameworks, by name."""
    by_name = {(row["framework"], row["architecture"]): row for row in [*kept, *new]}
    return [by_name[name] for name in sorted(by_name)]


def main() -> None:
    """Print a row for each architecture, then how many there are of each outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("vllm", "sglang"))
    parser.add_argument("--only", nargs="+", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--json", type=Path, help="write the rows to this file; with --only, its other rows stay")
    parser.add_argument("--markdown", type=Path, help="write them as a table to this file")
    parser.add_argument("--logs", type=Path, help="keep what the processes print in this folder")
    arguments = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    kept = (
        json.loads(arguments.json.read_text()) if arguments.only and arguments.json and arguments.json.exists() else []
    )
    rows: list[dict[str, Any]] = []
    for row in zoo(arguments.framework, arguments.only, arguments.logs):
        rows.append(asdict(row))
        if arguments.json:  # after each: a zoo that is interrupted has found something too
            arguments.json.write_text(json.dumps(merged(kept, rows), indent=1) + "\n")
    counts = Counter(row["outcome"] for row in rows)
    print(f"\n{len(rows)} architectures: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    if arguments.markdown:
        write_table(arguments.markdown, merged(kept, rows))


if __name__ == "__main__":
    main()
