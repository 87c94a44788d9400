"""Folders and files of any name, whatever the locale: home folders, spaces, accents, other scripts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmir
from llmir.compiler import cache_folder
from llmir.errors import LlmirError
from llmir.frontends.common.options import Options
from llmir.plan import Plan

NAME = "two words, modèle, 模型, модель"
#: What decides how Python writes text where nothing is said: no locale, and no UTF-8 instead of it.
NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMPILE = """
import sys
from pathlib import Path
from llmir import compiler
from llmir.frontends.common.plan_cache import get_or_make
from llmir.ir.one_layer import attention_module
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.workload import Workload
import logging
model, workload = sys.argv[1:]

def make():
    module = attention_module(model, "f32", 2, 2, 64, 16, max_length=64)
    options = compiler.Options(calibrate=False)
    return compiler.compile(module, Target.named("cpu:avx2"), Workload.load(workload), options)

def never():
    raise AssertionError

plan = get_or_make("key", make, logging.getLogger("llmir"))
assert plan.kernels[0].object_key
assert get_or_make("key", never, logging.getLogger("llmir")).dumps() == plan.dumps()
plan.write(Path(model) / "plan.json")
assert Plan.read(Path(model) / "plan.json").dumps() == plan.dumps()
"""


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, NO_LOCALE], ids=["own", "C", "C, no UTF-8"])
def test_a_model_is_compiled_and_kept_under_any_name(tmp_path: Path, locale: dict[str, str]) -> None:
    pytest.importorskip("llmir.ir.bindings")
    folder = tmp_path / NAME
    folder.mkdir()
    workload = folder / f"{NAME}.json"
    workload.write_text(
        f'{{"name": "{NAME}", "requests": [{{"prompt_tokens": 8, "output_tokens": 8}}]}}', encoding="utf-8"
    )
    environment = {**os.environ, **locale, "LLMIR_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", COMPILE, str(folder), str(workload)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "cache" / "objects").glob("*.o"))) == 1
    assert Plan.read(folder / "plan.json").model == str(folder)


def test_the_cache_folder_may_be_below_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLMIR_CACHE", "~/my cache")
    assert cache_folder() == tmp_path / "my cache"


def test_a_home_folder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMIR_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(LlmirError, match="no home folder for ~nobody-of-this-name/cache: set LLMIR_"):
        cache_folder()


def test_the_cache_folder_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMIR_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "cache"


def test_options_may_name_files_below_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = Options.read({"plan": "~/plan.json"}, {"LLMIR_WORKLOAD": "~/trace.jsonl"}, "")
    assert (options.plan, options.workload) == (str(tmp_path / "plan.json"), str(tmp_path / "trace.jsonl"))


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding."""
    name = ast.unparse(call.func).rpartition(".")[2]
    words = [word.value for word in ast.walk(call) if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return not ast.unparse(call.func).startswith("os.open") and bool({"r", "w", "a", "x"} & set(words))
    asked = {keyword.arg for keyword in call.keywords}
    return name in ("read_text", "write_text") or bool(
        {"text", "universal_newlines"} & asked and name in ("run", "Popen")
    )


def test_no_text_is_in_the_locale_s_encoding() -> None:
    found = []
    for file in sorted(Path(llmir.__file__).parent.rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
        found += [
            f"{file.name}:{call.lineno}"
            for call in calls
            if opens_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}
        ]
    assert found == []
