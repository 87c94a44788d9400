from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llmir.compare.environment import child_environment, recommended_preloads, recorded
from llmir.compare.frameworks import FRAMEWORKS, Framework
from llmir.compare.machine import cpu_ranges, readable_path, record, versions

VLLM, SGLANG = FRAMEWORKS["vllm"], FRAMEWORKS["sglang"]
HERE = Path(sys.prefix)


@pytest.mark.parametrize(
    ("cpus", "text"), [({0, 1}, "0-1"), ({3}, "3"), ({0, 1, 2, 5}, "0-2,5"), ({4, 0, 2}, "0,2,4"), (set(), "")]
)
def test_cpu_ranges(cpus: set[int], text: str):
    assert cpu_ranges(cpus) == text


@pytest.mark.parametrize(
    ("framework", "variable", "value"),
    [
        (VLLM, "VLLM_CPU_OMP_THREADS_BIND", cpu_ranges(os.sched_getaffinity(0))),
        (SGLANG, "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))),
    ],
    ids=["vllm", "sglang"],
)
def test_every_cpu_of_this_process_is_used_unless_the_user_says_otherwise(
    framework: Framework, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(variable, raising=False)
    assert child_environment(framework, "org/model", HERE)[variable] == value
    monkeypatch.setenv(variable, "7")
    assert child_environment(framework, "org/model", HERE)[variable] == "7"


def test_a_framework_gets_no_variable_of_another(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("VLLM_", "SGLANG_")):
            monkeypatch.delenv(name)
    assert not any(name.startswith("SGLANG_") for name in child_environment(VLLM, "org/model", HERE))
    assert not any(name.startswith("VLLM_") for name in child_environment(SGLANG, "org/model", HERE))


def test_a_model_folder_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert child_environment(VLLM, str(tmp_path), HERE)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in child_environment(VLLM, "org/model", HERE)


def test_libraries_of_the_frameworks_own_environment_are_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert str(library) in recommended_preloads("", tmp_path)
    assert str(library) in child_environment(SGLANG, "org/model", tmp_path)["LD_PRELOAD"].split(":")


def test_a_preloaded_openmp_runtime_gets_no_second(tmp_path: Path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    preloads = recommended_preloads("/x/libgomp.so.1", tmp_path)
    assert preloads[0] == "/x/libgomp.so.1"
    assert not any("libiomp" in library for library in preloads)


def test_the_record_is_json_and_says_what_a_reader_asks():
    facts = record()
    json.dumps(facts)
    assert facts["machine"]["cpu"]
    assert {"commit", "load_average_before", "date"} <= facts.keys()


def test_versions_are_of_what_is_installed():
    found = versions(("pytest", "no-such-package"))
    assert found["python"]
    assert found["pytest"] == pytest.__version__
    assert "no-such-package" not in found


def test_preloads_are_recorded_one_by_one():
    assert recorded(VLLM, {"LD_PRELOAD": "/x/a.so:/x/b.so"})["preloads"] == ["/x/a.so", "/x/b.so"]


def test_secrets_and_unrelated_variables_are_not_recorded():
    variables = {"VLLM_API_KEY": "k", "HOME": "/home/me", "VLLM_LOGGING_LEVEL": "INFO", "SGLANG_LOG_MS": "1"}
    assert recorded(VLLM, variables)["variables"] == {"VLLM_LOGGING_LEVEL": "INFO"}


def test_paths_below_the_working_folder_are_recorded_relative():
    assert readable_path(str(Path.cwd() / "models" / "m")) == "models/m"
