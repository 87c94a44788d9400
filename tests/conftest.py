import os
import sys

import pytest
from hypothesis import settings

# GPU programs run in Triton's interpreter, which has to be chosen before Triton is imported; what compiles them does so
# in processes without this.
os.environ["TRITON_INTERPRET"] = "1"

# Tests assert no timings, hypothesis's own limit of 200 ms an example included.
settings.register_profile("llmir", deadline=None)
settings.load_profile("llmir")


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
