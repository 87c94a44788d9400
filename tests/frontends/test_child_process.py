"""Programs that llmir starts: what lies in the working folder is not imported, and none is waited for without end."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmir
from llmir import child, kernel_test
from llmir.compare import interpreter
from llmir.compare.interpreter import Interpreter, versions_with
from llmir.errors import LlmirError
from llmir.frontends.common import planning
from llmir.targets.gpu import detection
from llmir.targets.records import TargetError

#: Of the standard library, imported early by everything; and a framework's name.
PLANTED = ("queue.py", "types.py", "select.py", "vllm/__init__.py", "sglang/__init__.py", "numpy/__init__.py")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with modules that tell when they are imported, and end the process."""
    for name in PLANTED:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\nraise SystemExit('planted {name}')\n"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_program_imports_nothing_from_the_working_folder(planted: Path) -> None:
    programs = [("-m", detection.__name__), ("-c", "import types, queue, select, numpy")]
    for program in programs:
        subprocess.run(child.python(*program), check=True, stdout=subprocess.PIPE)
    assert not (planted / "imported").exists()


def test_nor_does_a_program_that_it_starts(planted: Path) -> None:
    inner = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import queue, numpy'], check=True)"
    subprocess.run(child.python("-c", inner), env=child.environment({}), check=True)
    assert not (planted / "imported").exists()


def test_the_process_that_makes_a_plan_imports_nothing_from_there(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cloudpickle")
    with pytest.raises(planning.PlanningError, match="status 0"):  # a program of llmir's that gives no plan
        planning.plan_in_child("llmir.frontends.common.recording", None)
    assert not (planted / "imported").exists()


def test_nor_do_the_processes_of_a_comparison(planted: Path) -> None:
    assert versions_with(Interpreter(sys.executable, Path(sys.prefix)), ["numpy"])
    assert not (planted / "imported").exists()


def test_nor_does_the_kernel_test(planted: Path) -> None:
    with pytest.raises(LlmirError, match="none"):
        kernel_test.in_own_process("bf16", "/none/libgomp.so")
    assert not (planted / "imported").exists()


def starts_python(call: ast.Call) -> bool:
    """Whether a call runs a program."""
    return ast.unparse(call.func) in ("subprocess.run", "subprocess.Popen", "subprocess.check_output")


def test_every_program_that_is_waited_for_has_a_time_limit() -> None:
    without = []
    for file in sorted(Path(llmir.__file__).parent.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and starts_python(node)]
        names = [{keyword.arg for keyword in call.keywords} for call in calls if "Popen" not in ast.unparse(call.func)]
        without += [file.name for name in names if "timeout" not in name]
        assert '[sys.executable, "-' not in text, f"{file} starts Python without llmir.child.python"
    assert without == []


def test_a_plan_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cloudpickle")
    monkeypatch.setattr(planning, "PATIENCE", 0.01)
    with pytest.raises(planning.PlanningError, match="had no plan after 0 s and was ended"):
        planning.plan_in_child("llmir.frontends.common.recording", None)


def test_a_driver_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(detection, "PATIENCE", 0.01)
    with pytest.raises(TargetError, match="says nothing of its GPU within 0 s"):
        detection.find()


def test_another_interpreter_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_PATIENCE", 0.01)
    with pytest.raises(LlmirError, match="did not answer within 0 s"):
        versions_with(Interpreter(sys.executable, Path(sys.prefix)), ["numpy"])
