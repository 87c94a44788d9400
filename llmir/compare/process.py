"""One worker process: started, listened to, ended with everything it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llmir.compare.files import write_json
from llmir.compare.frameworks import Framework, framework_named
from llmir.compare.job import Job, Result
from llmir.compare.options import CompareOptions
from llmir.errors import LlmirError

_TAIL_LINES = 25
#: An exception as Python prints it, also behind the prefix of a framework's log line.
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$")


class SideFailedError(LlmirError):
    """A side's process failed; the message ends with the tail of its log, which is kept."""


def run_worker(
    command: Sequence[str],
    options: CompareOptions,
    side: str,
    with_quality: bool,
    environment: Mapping[str, str],
    stem: Path,
    announce: Callable[[str], None],
) -> Result:
    """Run one side in a fresh process; its files are ``stem`` with a suffix.

    ``announce`` gets the lines the process prints. Raises :class:`SideFailedError`.
    """
    job_path, result_path, log_path = (stem.with_suffix(suffix) for suffix in (".job", ".result", ".log"))
    job = Job(
        framework=options.framework,
        model=options.model,
        arguments=options.arguments(side),
        runs=options.runs(),
        seed=options.seed,
        quality=options.quality_task if options.quality and with_quality else None,
        started=time.monotonic(),
        result_path=str(result_path),
    )
    write_json(job_path, job.to_json())
    end = _run([*command, str(job_path)], environment, log_path, options.timeout_seconds, announce)
    if end is None and not result_path.is_file():
        end = "ended without a result"
    if end is not None:
        raise SideFailedError(_failure(framework_named(options.framework), side, end, log_path))
    return Result.from_json(json.loads(result_path.read_text(encoding="utf-8")))


def _run(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path, timeout: float, announce: Callable
) -> str | None:
    """Run to the end and return None if it ended well, else how it ended."""
    timed_out = threading.Event()
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,  # never written to; the worker sees it close when this process is gone
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a group of its own, so that it can be ended with its engine processes
        ) as process,
    ):

        def stop() -> None:
            timed_out.set()
            _end_group(process.pid)

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                announce(line.rstrip())
            code = process.wait()
        finally:
            timer.cancel()
            _end_group(process.pid)
    if timed_out.is_set():
        return f"did not finish within {timeout:.0f} s"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else None


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _failure(framework: Framework, side: str, end: str, log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    cause = _cause(lines, framework.echoes)
    # A framework whose process fails may kill all the others; only without a reason is the system to suspect.
    if cause is None and end.endswith(signal.SIGKILL.name):
        end += ", perhaps for lack of memory"
    sentence = f"the {side} side of the {framework.title} comparison {end}{f': {cause}' if cause else ''}"
    tail = "\n".join(lines[-_TAIL_LINES:])
    return f"{sentence}\n{_keep(log_path, side)}; it ends:\n{tail}"


def _cause(lines: Sequence[str], echoes: tuple[str, ...]) -> str | None:
    """The last exception that says more than that something failed (``echoes``); llmir's own come first."""
    found = [(i, match) for i, line in enumerate(lines) if (match := _EXCEPTION.search(line))]
    telling = [(i, match) for i, match in found if not match[2].startswith(echoes)]
    ours = [(i, match) for i, match in telling if match[1].startswith("llmir.")]
    if not telling:
        return None
    i, match = (ours or telling)[-1]
    message = " ".join([match[2], *_continued(lines[i + 1 :])])
    return message if ours else f"{match[1]}: {message}"


def _continued(lines: Sequence[str]) -> Iterator[str]:
    """The indented lines an exception's message goes on with, as validation errors do."""
    for line in lines:
        if not line.startswith("  ") or line.lstrip().startswith("For further information"):
            return
        yield line.strip()


def _keep(log_path: Path, side: str) -> str:
    """Move the log out of the folder that is about to go, and say where it is."""
    try:
        handle, kept = tempfile.mkstemp(prefix=f"llmir-compare-{side}-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log_path, kept)
    except OSError as error:
        return f"its log could not be kept ({error.strerror})"
    return f"its log is {kept}"
