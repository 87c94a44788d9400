import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# GPU programs run in Triton's interpreter, which has to be chosen before Triton is imported; what compiles them does so
# in processes without this.
os.environ["TRITON_INTERPRET"] = "1"

# Tests assert no timings, hypothesis's own limit of 200 ms an example included.
settings.register_profile("llmir", deadline=None)
settings.load_profile("llmir")

#: What takes a core for a second or more a test, time after time; `make unit` leaves it out, `make test` does not.
#: Files and folders that compile CPU kernels by the dozen, interpret GPU programs, compile those ahead of time, or make
#: the plans of whole models.
SLOW_PATHS = {
    *("kernels/gpu", "kernels/gpu_ahead", "kernels/test_attention.py", "kernels/test_changed_plans.py"),
    "kernels/test_case_matrix.py",
    *("kernels/test_exceptional_numbers.py", "kernels/test_objects.py", "kernels/test_one_runner.py"),
    *("kernels/test_rounding.py", "kernels/test_wide_vectors.py", "runtime/test_pages.py"),
    *("benchmarks/test_gpu_benchmark.py", "test_shipped_plans.py"),
}
#: Fixtures that start processes in place of a framework's.
SLOW_FIXTURES = {"worker"}


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    for item in (item for item in items if item.path.is_relative_to(tests)):
        path = item.path.relative_to(tests)
        places = {path.as_posix(), *(folder.as_posix() for folder in path.parents)}
        if places & SLOW_PATHS or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``llmir ARGUMENTS`` in this process: exit code, stdout, stderr."""

    from llmir import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmir", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)  # a command that succeeds may return
        return (ended.value.code or 0, *capsys.readouterr())

    return run
