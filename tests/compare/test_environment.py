from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmir.compare.environment import child_environment, cpu_ranges, readable_path, recommended_preloads, record


@pytest.mark.parametrize(
    ("cpus", "text"), [({0, 1}, "0-1"), ({3}, "3"), ({0, 1, 2, 5}, "0-2,5"), ({4, 0, 2}, "0,2,4"), (set(), "")]
)
def test_cpu_ranges(cpus: set[int], text: str):
    assert cpu_ranges(cpus) == text


def test_threads_are_bound_to_every_cpu_of_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    bound = child_environment("org/model")["VLLM_CPU_OMP_THREADS_BIND"]
    assert bound == cpu_ranges(os.sched_getaffinity(0))


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
    assert child_environment("org/model")["VLLM_CPU_OMP_THREADS_BIND"] == "7"


def test_a_model_folder_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert child_environment(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in child_environment("org/model")


def test_installed_libraries_are_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert str(library) in recommended_preloads("")


def test_a_preloaded_openmp_runtime_gets_no_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    preloads = recommended_preloads("/x/libgomp.so.1")
    assert preloads[0] == "/x/libgomp.so.1"
    assert not any("libiomp" in library for library in preloads)


def test_the_record_is_json_and_says_what_a_reader_asks():
    facts = record({"VLLM_CPU_OMP_THREADS_BIND": "0-1", "LD_PRELOAD": "/x/a.so:/x/b.so"})
    json.dumps(facts)
    assert facts["thread_binding"] == "0-1"
    assert facts["preloads"] == ["/x/a.so", "/x/b.so"]
    assert facts["versions"]["python"]
    assert facts["machine"]["cpu"]
    assert {"commit", "load_average_before", "date"} <= facts.keys()


def test_secrets_and_unrelated_variables_are_not_recorded():
    facts = record({"VLLM_API_KEY": "k", "HOME": "/home/me", "VLLM_LOGGING_LEVEL": "INFO"})
    assert facts["variables"] == {"VLLM_LOGGING_LEVEL": "INFO"}


def test_paths_below_the_working_folder_are_recorded_relative():
    assert readable_path(str(Path.cwd() / "models" / "m")) == "models/m"
