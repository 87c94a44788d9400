"""Compiles a kernel in a process of its own, which is this module run as a program.

What LLVM has no rule for ends its process (``LLVM ERROR: Do not know how to split ...``, SIGABRT), and no handler stops
that; so a process that serves compiles nothing itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from llmir.child import python
from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec

COMMAND = python("-m", "llmir.kernels.cpu.apart")
#: Kernels take seconds, on a busy machine some tens of them.
TIMEOUT_SECONDS = 600.0


def compile_apart(spec: KernelSpec) -> bytes:
    """As lowering.compile_object; KernelError that says how the process ended where it gave no object."""
    job = json.dumps(spec.to_json()).encode()
    try:
        done = subprocess.run(COMMAND, input=job, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise KernelError(
            f"compiling {spec.symbol} for {spec.isa} did not end within {TIMEOUT_SECONDS:.0f} s: try again when the "
            f"machine has less to do"
        ) from None
    if done.returncode == 0:
        return done.stdout
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    # A crash prints its stack below what went wrong.
    words = next((line for line in said if "ERROR" in line), said[-1] if said else "no further words")
    raise KernelError(
        f"{spec.symbol} cannot be compiled for {spec.isa}: the compiler ended with {how} ({words}); make the plan anew "
        f"with `llmir compile`"
    )


def main() -> None:
    """A spec as JSON on standard input, its object on standard output, what is wrong on standard error."""
    # Standard output carries the object alone; what libraries print there goes to standard error.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from llmir.kernels.cpu.lowering import compile_object

    try:
        compiled = compile_object(KernelSpec.from_json(json.load(sys.stdin)))
    except KernelError as error:
        sys.exit(str(error))
    with answer:
        answer.write(compiled)


if __name__ == "__main__":
    main()
