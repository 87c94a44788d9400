from __future__ import annotations

import os
import sys
from importlib import util
from pathlib import Path

import pytest

from llmir.compare.interpreter import Interpreter, interpreter_with, product_seconds, versions_with
from llmir.compare.machine import versions
from llmir.compare.options import DTYPES
from llmir.errors import LlmirError


def test_a_framework_that_is_installed_here_runs_here():
    assert interpreter_with("pytest").executable == sys.executable


def test_a_framework_may_have_an_environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / ".venvs" / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.chdir(tmp_path)
    found = interpreter_with("other")
    assert found.executable == str(python)
    assert found.prefix == tmp_path / ".venvs" / "other"


def test_a_folder_of_the_frameworks_name_is_not_the_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert util.find_spec("other") is not None
    with pytest.raises(LlmirError, match=r"other is not installed .* run: make \.venvs/other"):
        interpreter_with("other")


def test_versions_are_those_of_the_other_interpreter():
    packages = ("pytest", "no-such-package")
    assert versions_with(Interpreter(sys.executable, Path(sys.prefix)), packages) == versions(packages)


def test_products_are_timed_in_every_dtype():
    seconds = product_seconds(Interpreter(sys.executable, Path(sys.prefix)), os.environ)
    assert sorted(seconds) == sorted(DTYPES)
    assert all(value > 0 for value in seconds.values())


def test_an_interpreter_without_llmir_is_an_error(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'llmir'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(LlmirError, match="cannot run llmir: ModuleNotFoundError: No module named 'llmir'; install"):
        versions_with(Interpreter(str(python), tmp_path), ())
