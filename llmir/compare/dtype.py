"""Which dtype does a framework itself serve fastest on this machine? Measured once, without llmir.

Frameworks take the dtype a model was saved in, as a rule bfloat16, which a CPU without instructions for it multiplies
by emulation, many times slower than float32. An experienced user would not serve that, so the comparison does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmir.cache import DTYPE_CHOICES, KeptFolder, UntrustedError
from llmir.compare.environment import recorded
from llmir.compare.frameworks import Framework, framework_named
from llmir.compare.interpreter import Interpreter, product_seconds, versions_with
from llmir.compare.measuring import RequestRecord
from llmir.compare.options import DTYPES, CompareOptions
from llmir.compare.process import Limits, SideFailedError, SideStoppedError, run_worker
from llmir.compare.workloads import workload_named
from llmir.compiler import cache_folder
from llmir.targets.machine import Target

#: What every candidate serves twice: the first run touches everything once, the second counts.
WORKLOAD, _RUNS = "eighth", 2
#: A dtype is no candidate where a matrix product alone takes this many times as long as in another one: the processor
#: has no instructions for it, or far better ones for the other, and nothing that a framework does beside could make up
#: for that.
_NO_INSTRUCTIONS = 3.0
#: A candidate is stopped when it has served this many times as long as both runs of the best so far took, and a little
#: for what a process does beside: on a machine that others use too it might still be as fast before.
_TOO_LONG, _GRACE_SECONDS = 1.25, 2.0
#: A start reads the same files and makes the same tables in any dtype, but the first of them fills the system's caches,
#: and other programs disturb each of them: only one that takes much longer computes in an emulation.
_START_TOO_LONG, _START_GRACE_SECONDS = 2.0, 20.0


@dataclass(frozen=True)
class Candidate:
    """What a dtype came to; exactly one of the outcomes is there."""

    dtype: str
    seconds: float | None = None
    """The second run of :data:`WORKLOAD`, from the first request to the last token."""
    stopped: str | None = None
    """When it was stopped, because it was slower than another one: "stopped after 6 s"."""
    not_tried: float | None = None
    """How many times as long its matrix products take as the quickest ones: too many to try it."""
    failed: str | None = None
    """Why the framework could not serve it."""
    alone: bool = False
    """Nothing else came into question, so it was not timed."""

    def outcome(self) -> str:
        """In a few words."""
        if self.seconds is not None:
            return f"{self.dtype} {self.seconds:.1f} s"
        if self.alone:
            return f"{self.dtype} not timed, nothing else comes into question"
        if self.not_tried is not None:
            return f"{self.dtype} not tried (products take {self.not_tried:.1f} times as long)"
        return f"{self.dtype} {self.stopped or f'not served ({self.failed})'}"


@dataclass(frozen=True)
class Choice:
    """The dtype of both sides, and why."""

    dtype: str
    asked_for: bool
    """By the user; then there are no candidates."""
    workload: str | None = None
    """What the candidates served."""
    candidates: tuple[Candidate, ...] = ()
    measured: str | None = None
    """When, as an ISO date and time: the figures may have been kept from an earlier comparison."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)


def describe(choice: Mapping[str, Any], title: str) -> str:
    """A choice (:meth:`Choice.to_json`) as a line of a report on the framework called ``title``."""
    if choice["asked_for"]:
        return f"{choice['dtype']}, as asked for"
    outcomes = ", ".join(Candidate(**candidate).outcome() for candidate in choice["candidates"])
    timed = any(candidate["seconds"] is not None for candidate in choice["candidates"])
    served = f"{workload_named(choice['workload']).description}; " if timed else ""
    return f"{choice['dtype']}, fastest of {title}'s own here: {outcomes}; {served}measured {choice['measured']}"


def choose(
    options: CompareOptions,
    interpreter: Interpreter,
    environment: Mapping[str, str],
    worker: Sequence[str],
    say: Callable[[str], None],
) -> Choice:
    """The dtype that the user asked for, else the one that the framework by itself serves fastest on this machine.

    Candidates are measured in fresh processes of ``worker`` with ``environment``, unless that was done before: outcomes
    are kept in llmir's cache folder. ``say`` gets a line for each thing done. Raises :class:`SideFailedError` if the
    framework serves none of them.
    """
    given = options.engine.get("dtype", options.dtype)
    if given is not None:
        return Choice(str(given), asked_for=True)
    framework = framework_named(options.framework)
    trial = _trial(options, framework)
    facts = _facts(trial, framework, interpreter, environment)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder, name = KeptFolder(cache_folder() / DTYPE_CHOICES), f"{digest}.json"
    choice = _kept(folder, name, facts)
    if choice is not None:
        say(f"{describe(choice.to_json(), framework.title)}; kept in {folder.path / name}")
        return choice
    products = product_seconds(interpreter, environment)
    candidates = _measure(trial, products, [interpreter.executable, *worker], environment, say)
    choice = _choice(candidates, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    say(describe(choice.to_json(), framework.title))
    outcome = {"facts": facts, "measured": choice.measured, "candidates": list(map(asdict, candidates))}
    try:
        folder.write(name, json.dumps(outcome, indent=1).encode())
    except OSError as error:
        say(f"it will be measured again the next time: cannot write {folder.path}: {error.strerror}")
    except UntrustedError as error:
        say(f"it will be measured again the next time: {error}")
    return choice


def _trial(options: CompareOptions, framework: Framework) -> CompareOptions:
    """What a candidate's process is asked; it does not depend on the workloads that are to be compared."""
    return replace(
        options,
        workloads=(WORKLOAD,),
        repeats=_RUNS,
        quality=False,
        warm_up=False,
        engine={**framework.quick_start, **options.engine},
    )


def _facts(
    trial: CompareOptions, framework: Framework, interpreter: Interpreter, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that the outcome depends on, as JSON values."""
    configuration = Path(trial.model, "config.json")
    facts = {
        "machine": Target.detect().to_json(),
        "framework": [framework.name, versions_with(interpreter, framework.packages)],
        "model": json.loads(configuration.read_text(encoding="utf-8")) if configuration.is_file() else trial.model,
        "arguments": trial.arguments("baseline"),
        "environment": recorded(framework, environment),
        "served": [workload_named(WORKLOAD).description, _RUNS],
    }
    return json.loads(json.dumps(facts, default=str))


def _measure(
    trial: CompareOptions,
    products: Mapping[str, float],
    command: Sequence[str],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Candidate]:
    """One process after another, each limited by the best before it; raises the first error if none serves.

    ``products``: seconds by dtype. The quickest comes first, so that the first one is never an emulation.
    """
    times = {dtype: seconds / min(products.values()) for dtype, seconds in products.items()}
    in_order = sorted(times, key=lambda name: times[name])
    quick = [dtype for dtype in in_order if times[dtype] < _NO_INSTRUCTIONS]
    slow = in_order[len(quick) :]
    if len(quick) == 1:
        return [Candidate(quick[0], alone=True), *(Candidate(dtype, not_tried=times[dtype]) for dtype in slow)]
    candidates, errors = [], []
    best, limits = math.inf, Limits()
    with tempfile.TemporaryDirectory(prefix="llmir-dtype-") as folder:
        for dtype in (*quick, *slow):
            if best < math.inf and dtype in slow:
                candidates.append(Candidate(dtype, not_tried=times[dtype]))
                say(candidates[-1].outcome())
                continue

            def announce(line: str, dtype: str = dtype) -> None:
                say(f"{dtype}: {line}")

            try:
                options = replace(trial, dtype=dtype)
                stem = Path(folder, dtype)
                result = run_worker(command, options, "baseline", False, environment, stem, announce, limits)
            except SideStoppedError as error:
                candidates.append(Candidate(dtype, stopped=str(error)))
            except SideFailedError as error:
                errors.append(error)
                candidates.append(Candidate(dtype, failed=str(error).splitlines()[0]))
            else:
                runs = [_seconds(records) for records in result.runs[WORKLOAD]]
                candidates.append(Candidate(dtype, seconds=runs[-1]))
                if runs[-1] < best:
                    best = runs[-1]
                    limits = Limits(
                        _START_TOO_LONG * result.start_up.total_seconds + _START_GRACE_SECONDS,
                        _TOO_LONG * sum(runs) + _GRACE_SECONDS,
                    )
            say(candidates[-1].outcome())
    if all(candidate.seconds is None for candidate in candidates):
        raise errors[0]
    return candidates


def _seconds(records: Sequence[RequestRecord]) -> float:
    """From the first request to the last token."""
    return max(record.token_times[-1] for record in records) - min(record.submitted for record in records)


def _choice(candidates: Sequence[Candidate], measured: str) -> Choice:
    """The fastest; ValueError if there is none."""
    served = (candidate for candidate in candidates if candidate.alone or candidate.seconds is not None)
    best = min(served, key=lambda candidate: candidate.seconds or 0.0)
    return Choice(best.dtype, False, WORKLOAD, tuple(candidates), measured)


def _kept(folder: KeptFolder, name: str, facts: Mapping[str, Any]) -> Choice | None:
    """The choice by what was kept under ``name``; None if there is nothing, or nothing that can be trusted."""
    try:
        data = json.loads(folder.read(name) or b"")
        candidates = [Candidate(**candidate) for candidate in data["candidates"]]
        known = data["facts"] == facts and sorted(c.dtype for c in candidates) == sorted(DTYPES)
        return _choice(candidates, str(data["measured"])) if known and all(map(_is_sane, candidates)) else None
    except (OSError, UntrustedError, ValueError, TypeError, KeyError):
        return None


def _is_sane(candidate: Candidate) -> bool:
    numbers, words = (candidate.seconds, candidate.not_tried), (candidate.stopped, candidate.failed)
    if candidate.alone:
        return not any(value is not None for value in (*numbers, *words))
    (outcome,) = [value for value in (*numbers, *words) if value is not None]
    return isinstance(outcome, str) if outcome in words else isinstance(outcome, float) and 0 < outcome < math.inf
