from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmir.compare import dtype, orchestration
from llmir.compare.interpreter import Interpreter
from llmir.compare.options import CompareOptions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as far as a comparison looks into it before it starts anything."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    return folder


@pytest.fixture
def options(model: Path) -> Callable[..., CompareOptions]:
    def make(**fields: object) -> CompareOptions:
        given = {"model": str(model), "workloads": ("smoke",), "dtype": "bfloat16", "timeout_seconds": 60, **fields}
        return CompareOptions(**given)

    return make


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fake workers note that they were started."""
    path = tmp_path / "starts"
    monkeypatch.setenv("FAKE_STARTS", str(path))
    return path


@pytest.fixture
def worker(starts: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What this interpreter is given to be a process that stands in for a side of any framework."""
    here = Interpreter(sys.executable, Path(sys.prefix))
    monkeypatch.setattr(orchestration, "interpreter_with", lambda framework: here)
    monkeypatch.setenv("LLMIR_CACHE", str(starts.with_name("cache")))
    # Whatever processor runs the tests: every dtype is a candidate, float32 the first of them.
    products = {"float32": 0.010, "float16": 0.011, "bfloat16": 0.012}
    monkeypatch.setattr(dtype, "product_seconds", lambda interpreter, environment: products)
    return (str(Path(__file__).with_name("fake_worker.py")),)
