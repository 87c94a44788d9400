"""A framework's own HTTP server while a test asks it something."""

from __future__ import annotations

import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(
    command: list[str], environment: Mapping[str, str], log: Path, start_seconds: float
) -> Iterator[tuple[str, int]]:
    """Runs ``command`` on a free port until the end of the block: its address once it answers, and its session.

    It has a session of its own, so that what it leaves behind can be told, and writes to ``log``.
    """
    port = _free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + start_seconds
        while not _answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    """A port that nothing listens on and that no outgoing connection is given.

    The server binds it many seconds from now, once its model is loaded. Linux gives ports from 32768 up to whoever
    connects meanwhile, the server's own ranks among them; SGLang draws from 22000 to 29999 for them.
    """
    for port in random.sample(range(10_000, 20_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("none of 100 ports between 10000 and 19999 is free on 127.0.0.1")


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
