"""Stands in for a side's process: reads a job and writes what a framework of known speed would measure.

The engine argument ``behaviour`` makes it misbehave, ``of_dtype`` by dtype. Every start is noted in the file
``FAKE_STARTS``, as JSON. Without anything allotted it leaves out all workloads but the first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from llmir.compare.files import write_json
from llmir.compare.job import Job, Result, StartUp
from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Answers, Continuation


def records(step: float) -> list[RequestRecord]:
    """Two requests that decode in lock step, one token each ``step`` seconds, from 1 s on."""
    times = [1.0 + step * i for i in range(5)]
    return [RequestRecord(10, 0.0, times, 0), RequestRecord(10, 0.0, times, 0)]


def one_token(seconds: float) -> list[RequestRecord]:
    """Two requests with 9 of their 10 tokens in the prefix cache and one to generate."""
    return [RequestRecord(10, 0.0, [seconds], 9)] * 2


def answers(logprob: float) -> Answers:
    continuations = [Continuation([7, 8], [{7: logprob}, {8: logprob}], 128)]
    return Answers(continuations, continuations, [[logprob] * 4])


def main() -> None:
    job = Job.from_json(json.loads(Path(sys.argv[1]).read_text()))
    llmir = job.arguments.get("attention_backend") in ("LLMIR", "llmir")
    with Path(os.environ["FAKE_STARTS"]).open("a") as starts:
        side = "llmir" if llmir else "baseline"
        note = {
            "framework": job.framework,
            "side": side,
            "quality": job.quality is not None,
            "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"),
            "dtype": job.arguments.get("dtype"),
            "eager": job.arguments.get("enforce_eager", False),
            "workloads": list(job.runs),
            "allotted": job.allotted is not None,
            "warm_up": job.warm_up,
        }
        print(json.dumps(note), file=starts)
        starts.flush()
        noted = [json.loads(line) for line in Path(os.environ["FAKE_STARTS"]).read_text().splitlines()]
        first = sum((n["framework"], n["side"]) == (job.framework, side) for n in noted) == 1
    behaviour = job.arguments.get("of_dtype", {}).get(job.arguments.get("dtype"), job.arguments.get("behaviour"))
    match behaviour:
        case "raise":
            print(
                "(EngineCore) ERROR llmir.errors.UnsupportedLayerError: llmir cannot serve layer 'x'", file=sys.stderr
            )
            print("RuntimeError: Engine core initialization failed. See above.", file=sys.stderr)
            sys.exit(3)
        case "refuse":
            print(
                "pydantic.ValidationError: 1 validation error for ModelConfig\n  Value error, too long", file=sys.stderr
            )
            print("    For further information visit https://errors.pydantic.dev", file=sys.stderr)
            sys.exit(1)
        case "one line":
            print(r"RuntimeError: no room for the cache\n\nTraceback (most recent call last):\n  File", file=sys.stderr)
            sys.exit(3)
        case "long":
            print("RuntimeError:" + 500 * " word", file=sys.stderr)
            sys.exit(3)
        case "child":
            print("[06:12:46] Scheduler hit an exception: Traceback (most recent call last):", file=sys.stderr)
            print("NotImplementedError: there is no such kernel", file=sys.stderr)
            print("[06:12:46] Received sigquit from a child process. It usually means the child failed.")
            os.kill(os.getpid(), signal.SIGKILL)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "silent":
            return
        case "hang":
            time.sleep(600)
    print("ready after 0 s", flush=True)
    if behaviour == "serve forever":
        time.sleep(600)
    step = 0.25 if behaviour == "fast" else 0.5 if llmir else 1.0
    run = [name for i, name in enumerate(job.runs) if i == 0 or job.allotted != 0]
    for name in run:
        print(f"{name} done", flush=True)
    result = Result(
        StartUp(1.0, 2.0 + llmir + 10 * first, 3.0 + llmir + 10 * first),
        {"python": "3.11", job.framework: "1.0"},
        {
            "attention_backend": "own",
            "dtype": job.arguments["dtype"],
            "block_size": 128,
            "page_size": 16,
            "threads": 2,
            "platform": "own products",
        },
        {
            name: [one_token(step) if name == "extend" else records(step)] * repeats
            for name, repeats in job.runs.items()
            if name in run
        },
        answers(-1.0 - 0.1 * llmir) if job.quality else None,
    )
    write_json(Path(job.result_path), result.to_json())


if __name__ == "__main__":
    main()
