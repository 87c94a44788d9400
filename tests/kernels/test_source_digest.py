"""What of llmir's source is in a cache key: all that the writer imports, wherever that stands, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmir.errors import KernelError
from llmir.kernels.cpu.object_cache import GENERATOR
from llmir.kernels.source_digest import PACKAGE, closure_digest, files_digest, import_closure
from llmir.kernels.work_list import Item

#: The modules whose digests are in keys: of objects, and of figures.
CPU_CALIBRATION, GPU_CALIBRATION = "llmir.kernels.cpu.calibration", "llmir.kernels.gpu.calibration"
WRITERS = (GENERATOR, CPU_CALIBRATION, GPU_CALIBRATION)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of llmir's sources, to edit."""
    return shutil.copytree(PACKAGE, tmp_path / "llmir", ignore=shutil.ignore_patterns("__pycache__"))


def is_another(writer: str, package: Path) -> bool:
    return closure_digest(writer, package) != closure_digest(writer)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_copy_of_the_same_sources_has_the_same_digest(package, writer):
    assert not is_another(writer, package)


@pytest.mark.parametrize(
    ("file", "writers"),
    [
        ("kernels/work_list.py", (GENERATOR, CPU_CALIBRATION)),
        ("kernels/cpu/abi.py", (GENERATOR, CPU_CALIBRATION)),
        ("ir/bindings.py", (GENERATOR, CPU_CALIBRATION)),
        ("ir/kernel_spec.py", WRITERS),
        ("__init__.py", WRITERS),  # it runs before any other
        ("kernels/cpu/calibration.py", (CPU_CALIBRATION,)),
        ("kernels/cpu/loader.py", (CPU_CALIBRATION,)),
        ("targets/host.py", (CPU_CALIBRATION, GPU_CALIBRATION)),
        ("kernels/gpu/measuring.py", (GPU_CALIBRATION,)),  # imported by functions alone
        ("cli/explain.py", ()),
        ("targets/x86/tiles.py", ()),
        ("runtime/schedule.py", ()),
    ],
)
def test_an_edit_is_seen_by_those_who_import_it(package, file, writers):
    with (package / file).open("a") as source:
        source.write("# edited\n")
    assert tuple(writer for writer in WRITERS if is_another(writer, package)) == writers


@pytest.mark.parametrize("writer", [GENERATOR, CPU_CALIBRATION])
def test_a_column_more_is_seen(package, writer):
    work_list = package / "kernels" / "work_list.py"
    text = work_list.read_text()
    work_list.write_text(text.replace("\n\n\nITEM_FIELDS", f"\n    EXTRA = {len(Item)}\n\n\nITEM_FIELDS"))
    assert work_list.read_text() != text and is_another(writer, package)


@pytest.mark.parametrize("writer", [GENERATOR, CPU_CALIBRATION])
def test_every_module_that_is_really_imported_is_in_the_closure(writer):
    compiles = "from llmir.targets.machine import Target; writer._compile(Target.detect().isa)"
    code = f"""
import sys, {writer} as writer
{compiles if writer == CPU_CALIBRATION else ""}
print(*(module for module in sys.modules if module.partition(".")[0] == "llmir"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(import_closure(writer)) == set()


def test_finding_the_closure_imports_nothing():
    code = f"""
import sys
from llmir.kernels import source_digest
before = set(sys.modules)
closures = [source_digest.import_closure(writer) for writer in {WRITERS}]
print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import p.other", {"p.other"}),
        ("import os, p.inner.leaf as leaf", {"p.inner", "p.inner.leaf"}),
        ("from p import other", {"p.other"}),
        ("from p.other import name", {"p.other"}),
        ("from p.other import *", {"p.other"}),
        ("from p.inner import leaf, name", {"p.inner", "p.inner.leaf"}),
        ("from p import name", set()),
        ("from . import other", {"p.other"}),
        ("from .inner import leaf", {"p.inner", "p.inner.leaf"}),
        ("from .bare import leaf", {"p.bare.leaf"}),  # a package without an __init__
        ("def f():\n    if f:\n        from p import other", {"p.other"}),
        ("class C:\n    async def f(self):\n        async with f:\n            import p.other", {"p.other"}),
        (
            "try:\n    import p.other\nexcept E:\n    import p.inner\nelse:\n    x\nfinally:\n    x",
            {"p.other", "p.inner"},
        ),
        ("try:\n    x\nfinally:\n    import p.other", {"p.other"}),
        ("match x:\n    case 1:\n        import p.other", {"p.other"}),
        ("for x in y:\n    x\nelse:\n    import p.other", {"p.other"}),
        ("if TYPE_CHECKING:\n    import p.other\nelse:\n    import p.inner", {"p.inner"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    import p.other", set()),
        ("'''import p.other'''", set()),
        ("from os import path; import numpy.p", set()),
        ("import p.cycle", {"p.cycle"}),
    ],
)
def test_every_form_of_import_is_followed(tmp_path, source, expected):
    package = tmp_path / "p"
    sources = {"__init__": "", "root": source, "other": "", "cycle": "from p import root", "inner/__init__": ""}
    for name, text in {**sources, "inner/leaf": "", "bare/leaf": ""}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    assert set(import_closure("p.root", package)) == {"p", "p.root"} | expected


def test_imports_of_a_package_itself_count_where_only_a_module_in_it_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, text in {"__init__": "", "inner/__init__": "from .. import far", "inner/leaf": "", "far": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert "p.far" in import_closure("p.inner.leaf", tmp_path)


def test_a_module_without_source_is_an_error_that_names_it(tmp_path):
    (tmp_path / "root.py").write_text("import p.compiled")
    with pytest.raises(KernelError, match=r"p\.compiled has no source"):
        closure_digest("p.root", tmp_path)


def test_a_digest_tells_where_a_file_ends(tmp_path):
    def digest(a: str, b: str) -> str:
        (tmp_path / "a").write_text(a)
        (tmp_path / "b").write_text(b)
        return files_digest([tmp_path / "a", tmp_path / "b"], tmp_path)

    assert digest("xb", "y") != digest("x", "by") and digest("xb 1\n", "y") != digest("x", "b 1\ny")


def test_a_digest_holds_the_files_names(tmp_path):
    (tmp_path / "a").write_text("x")
    before = files_digest([tmp_path / "a"], tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert files_digest([tmp_path / "b"], tmp_path) != before
