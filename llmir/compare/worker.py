"""One side of a comparison, in a process of its own: ``python -m llmir.compare.worker JOB``.

Reads a :class:`Job`, starts the framework, runs the workloads and writes a :class:`Result`. Standard output
carries a line for each step done (:func:`llmir.compare.job.steps`); whatever the framework prints goes to standard
error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llmir.compare.engine import Engine
from llmir.compare.files import write_json
from llmir.compare.frameworks import framework_named
from llmir.compare.job import QUALITY, READY, Job, Result, StartUp
from llmir.compare.machine import versions
from llmir.compare.measuring import Pace, RequestRecord
from llmir.compare.quality import Answers, QualityTask, english_text, pieces
from llmir.compare.workloads import (
    GeneratedPrefixes,
    Request,
    Workload,
    equal_requests,
    prefixes_before,
    workload_named,
)

#: Not measured: touches the code of prefill and decode, and more tokens than one step takes.
_WARM_UP = Workload("warm-up", "16 requests, 288 tokens in, 8 out", 1, equal_requests(16, 288, 8))

Announce = Callable[[str], None]


def measure(job: Job, announce: Announce) -> Result:
    """Start the job's framework and measure everything the job asks for."""
    framework = framework_named(job.framework)
    start = framework.load()
    imported = time.monotonic()
    engine = start(job.model, job.arguments)
    ready = time.monotonic()
    start_up = StartUp(imported - job.started, ready - imported, ready - job.started)
    announce(f"{READY} after {start_up.total_seconds:.0f} s")

    vocabulary = engine.vocabulary()
    if job.warm_up:
        engine.serve(_WARM_UP.requests(vocabulary, job.seed, 0))
    runs: dict[str, list[list[RequestRecord]]] = {}
    pace = Pace()
    for name, repeats in job.runs.items():
        workload = workload_named(name)
        if runs and not _fits(job, repeats * pace.seconds(workload.tokens()), pace):
            continue
        runs[name] = _timed_runs(engine, workload, repeats, vocabulary, job.seed, announce)
        for records in runs[name]:
            pace = pace.slower(Pace.of(records))
    answers = None
    if job.quality is not None:
        answers = _answer(engine, job.quality)
        announce(f"{QUALITY} done")
    return Result(start_up, versions(framework.packages), engine.settings(), runs, answers)


def _fits(job: Job, seconds: float, pace: Pace) -> bool:
    """Whether a workload of ``seconds`` ends within what the job is allotted, the quality check after it too.

    The pace is that of the slowest workload before; the longer a context the slower it gets, so it may take longer.
    """
    if job.allotted is None:
        return True
    quality = pace.seconds(job.quality.tokens()) if job.quality is not None else 0.0
    return time.monotonic() - job.started + seconds + quality <= job.allotted


def _timed_runs(
    engine: Engine, workload: Workload, repeats: int, vocabulary: list[int], seed: int, announce: Announce
) -> list[list[RequestRecord]]:
    runs = []
    for repeat in range(repeats):
        if isinstance(workload.build, GeneratedPrefixes):
            requests = engine.generate_requests(workload.build, seed + repeat)
        else:
            requests = workload.requests(vocabulary, seed, repeat)
        if prefixes := prefixes_before(requests):
            engine.serve(prefixes)
        runs.append(_converse(engine, requests))
    announce(f"{workload.name} done")
    return runs


def _converse(engine: Engine, requests: Sequence[Request]) -> list[RequestRecord]:
    """Serve requests, and then what the clients say to the answers, turn by turn.

    The answers are those the engine gave: the two sides' may differ in a token here and there, but not in length.
    """
    records: list[RequestRecord] = []
    turn = 0
    while requests:
        served = engine.serve(requests)
        records += [replace(record, turn=turn) for record in served]
        asked = zip(requests, served, strict=True)
        requests = [request.next_turn(record.token_ids) for request, record in asked if request.later_messages]
        turn += 1
    return records


def _answer(engine: Engine, task: QualityTask) -> Answers:
    text = engine.encode(english_text())
    prompts = pieces(text, task.prompts, task.prompt_tokens)
    engine.forget_prefixes()
    cold = engine.continue_greedily(prompts, task.output_tokens)
    cached = engine.continue_greedily(prompts, task.output_tokens)
    return Answers(cold, cached, engine.score(pieces(text, task.windows, task.window_tokens)))


def _end_with_parent() -> None:
    """End this process group when standard input closes: nobody is left to wait for the result."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Entry point of the worker process; any error ends it with a traceback in its log."""
    # The framework and its processes log to standard output: keep that stream for announcements alone.
    announcements = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job.from_json(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    result = measure(job, lambda line: print(line, file=announcements))
    write_json(Path(job.result_path), result.to_json())
    # Past the interpreter's own end: threads that a framework left running may abort the process there ("terminate
    # called without an active exception"), after all is measured. The engine's processes are ended by who waits for us.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
