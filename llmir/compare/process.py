"""One worker process: started, listened to, ended with everything it started."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmir.compare.files import write_json
from llmir.compare.frameworks import Framework, framework_named
from llmir.compare.job import READY, Job, Result, announced_step
from llmir.compare.options import CompareOptions
from llmir.errors import LlmirError

#: Characters of a cause that are told; the log has all of it.
_TOLD = 400
#: An exception as Python prints it, also behind the prefix of a framework's log line.
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$")


class SideFailedError(LlmirError):
    """A side's process failed; the message says why as far as its log tells, and where that is kept."""


class SideStoppedError(LlmirError):
    """A side's process was ended because it took longer than was of interest; see :class:`Limits`."""


@dataclass(frozen=True)
class Limits:
    """How many seconds of a process are of interest, beside ``CompareOptions.timeout_seconds``; inf: all."""

    start: float = math.inf
    """From its start until it is ready."""
    serving: float = math.inf
    """From then until its end."""
    allotted: float | None = None
    """From its start until its end, as far as leaving out workloads can keep it; None: nothing is left out."""


def run_worker(
    command: Sequence[str],
    options: CompareOptions,
    side: str,
    with_quality: bool,
    environment: Mapping[str, str],
    stem: Path,
    announce: Callable[[str], None],
    limits: Limits | None = None,
) -> Result:
    """Run one side in a fresh process; its files are ``stem`` with a suffix.

    ``announce`` gets the lines the process prints. Raises :class:`SideFailedError`, and :class:`SideStoppedError`
    where the process is over ``limits``.
    """
    job_path, result_path, log_path = (stem.with_suffix(suffix) for suffix in (".job", ".result", ".log"))
    limits = limits or Limits()
    job = Job(
        framework=options.framework,
        model=options.model,
        arguments=options.arguments(side),
        runs=options.runs(),
        seed=options.seed,
        warm_up=options.warm_up,
        allotted=limits.allotted,
        quality=options.quality_task if options.quality and with_quality else None,
        started=time.monotonic(),
        result_path=str(result_path),
    )
    write_json(job_path, job.to_json())
    end = _run([*command, str(job_path)], environment, log_path, options.timeout_seconds, limits, announce)
    if end is None and not result_path.is_file():
        end = "ended without a result"
    if end is not None:
        raise SideFailedError(_failure(framework_named(options.framework), side, end, log_path))
    return Result.from_json(json.loads(result_path.read_text(encoding="utf-8")))


class _Watch:
    """Ends a process group that is over a limit; the limit set last counts."""

    def __init__(self, group: int):
        self._group = group
        self._timer: threading.Timer | None = None
        self.over: Exception | None = None
        """What the limit was that the process was ended for."""

    def allow(self, seconds: float, over: Exception) -> None:
        """``seconds`` from now (inf: no end); ``over`` is what to say then."""
        self.stop()
        if seconds < math.inf:
            self._timer = threading.Timer(seconds, self._end, [over])
            self._timer.start()

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, over: Exception) -> None:
        self.over = over
        _end_group(self._group)


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path,
    timeout: float,
    limits: Limits,
    announce: Callable[[str], None],
) -> str | None:
    """Run to the end and return None if it ended well, else how it ended.

    Raises :class:`SideStoppedError` where it took longer than ``limits``.
    """
    started = time.monotonic()
    timed_out = TimeoutError(f"did not finish within {timeout:.0f} s")
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,  # never written to; the worker sees it close when this process is gone
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a group of its own, so that it can be ended with its engine processes
        ) as process,
    ):
        watch = _Watch(process.pid)

        def allow(seconds: float, over: str) -> None:
            left = started + timeout - time.monotonic()
            stopped = SideStoppedError(f"{over} after {seconds:.0f} s")
            watch.allow(min(seconds, left), stopped if seconds < left else timed_out)

        allow(limits.start, "not ready")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if announced_step(line) == READY:
                    allow(limits.serving, "stopped")
                announce(line.rstrip())
            code = process.wait()
        finally:
            watch.stop()
            _end_group(process.pid)
    if isinstance(watch.over, SideStoppedError):
        raise watch.over
    if watch.over is not None:
        return str(watch.over)
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
    said = f": {_told(cause)}" if cause else ""
    return f"the {side} side of the {framework.title} comparison {end}{said}\n{_keep(log_path, side)}"


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


def _told(cause: str) -> str:
    """A cause without what some put behind it in the same line: a traceback, another process's output."""
    sentence = cause.split("\\n")[0].strip()
    return sentence if len(sentence) <= _TOLD else f"{sentence[:_TOLD].rsplit(' ', 1)[0]} ..."


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
