"""Who may import whom, held by reading every module of llmir."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmir

ROOT = Path(llmir.__file__).parent

#: Plain records, that know neither MLIR nor torch.
RECORDS = (
    *("llmir.ir.dtypes", "llmir.ir.cache_format", "llmir.ir.attention_spec", "llmir.ir.quant_scheme"),
    *("llmir.ir.records", "llmir.ir.import_level", "llmir.ir.kernel_spec", "llmir.ir.ranges"),
)
#: What says which kernels there are; kinds of targets import records alone.
REGISTRY = "llmir.targets.registry"

#: What each room may import of llmir besides itself. A longer name goes before a shorter one.
MAY_IMPORT = {
    "llmir": (),
    "llmir.errors": (),
    "llmir.cache": ("llmir.errors",),
    "llmir.child": (),
    **dict.fromkeys(RECORDS, (*RECORDS, REGISTRY)),
    "llmir.ir": ("llmir.errors", *RECORDS, REGISTRY),
    REGISTRY: ("llmir.targets", *RECORDS),
    "llmir.targets": ("llmir.errors", "llmir.child", *RECORDS, REGISTRY),
    "llmir.workload": ("llmir.errors",),
    "llmir.plan": ("llmir.errors", *RECORDS),
    "llmir.costs.sharing": RECORDS,
    "llmir.costs": ("llmir.errors", "llmir.ir", "llmir.targets", "llmir.costs.sharing", "llmir.workload"),
    "llmir.passes": ("llmir.errors", "llmir.ir", "llmir.targets", "llmir.costs", "llmir.workload"),
    "llmir.kernels.gpu.toolchain": ("llmir.errors", "llmir.cache", "llmir.targets"),
    "llmir.kernels": (
        *("llmir.errors", "llmir.cache", "llmir.child", "llmir.ir", "llmir.targets"),
        "llmir.kernels.gpu.toolchain",
    ),
    "llmir.runtime": (
        *("llmir.errors", "llmir.plan", "llmir.kernels", "llmir.costs.sharing"),
        *RECORDS,
        REGISTRY,
    ),
    "llmir.compiler": (
        *("llmir", "llmir.errors", "llmir.cache", "llmir.ir", "llmir.targets", "llmir.workload", "llmir.plan"),
        *("llmir.passes", "llmir.kernels"),
    ),
    "llmir.kernel_test": (
        *("llmir.errors", "llmir.ir", "llmir.targets", "llmir.workload", "llmir.plan", "llmir.kernels"),
        *("llmir.child", "llmir.runtime", "llmir.compiler"),
    ),
    "llmir.frontends": (
        *("llmir", "llmir.errors", "llmir.ir", "llmir.targets", "llmir.workload", "llmir.plan"),
        *("llmir.cache", "llmir.child", "llmir.kernels", "llmir.runtime", "llmir.compiler"),
    ),
    "llmir.compare": (
        *("llmir", "llmir.errors", "llmir.cache", "llmir.child", "llmir.plan", "llmir.targets", "llmir.compiler"),
    ),
    "llmir.cli": (
        *("llmir", "llmir.errors", "llmir.ir", "llmir.targets", "llmir.workload", "llmir.plan"),
        *("llmir.compiler", "llmir.compare", "llmir.frontends", "llmir.kernels.gpu.toolchain"),
        *("llmir.cache", "llmir.kernel_test"),
    ),
}

#: The only modules that may import these packages, function-level imports included.
ONLY_IN = {
    "torch_mlir": ("llmir.ir.bindings",),
    "mlir": ("llmir.ir.bindings",),
    "vllm": ("llmir.frontends.vllm", "llmir.compare.vllm_engine"),
    "sglang": ("llmir.frontends.sglang", "llmir.compare.sglang_engine"),
    "torch": (
        *("llmir.frontends", "llmir.runtime.gpu", "llmir.kernels.gpu.calibration"),
        *("llmir.compare.vllm_engine", "llmir.compare.sglang_engine", "llmir.compare.products"),
    ),
    "triton": ("llmir.kernels.gpu",),
    "transformers": ("llmir.frontends", "llmir.compare.vllm_engine", "llmir.compare.sglang_engine"),
}

#: What a serving process imports: none of it may load the compiler's bindings or a framework.
SERVING = (
    "llmir",
    "llmir.cache",
    "llmir.plan",
    "llmir.ir.kernel_spec",
    "llmir.ir.ranges",
    "llmir.costs.sharing",
    "llmir.kernels.reference",
    "llmir.kernels.cpu.abi",
    "llmir.kernels.cpu.apart",
    "llmir.kernels.cpu.kernel",
    "llmir.kernels.cpu.loader",
    "llmir.kernels.cpu.object_cache",
    "llmir.kernels.gpu.ahead",
    "llmir.runtime.cpu",
    "llmir.runtime.layers",
    "llmir.runtime.schedule",
    "llmir.frontends.common.planning",
    "llmir.frontends.common.support",
    "llmir.frontends.vllm.plugin",
)


def module_name(file: Path, root: Path = ROOT) -> str:
    """Dotted name of a module file: ``llmir/ir/types.py`` is ``llmir.ir.types``."""
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports(source: str, name: str, *, is_package: bool = False) -> Iterator[str]:
    """Every name a module imports, wherever in it the import stands; relative ones resolved."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and node.args
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
        ):
            yield from dynamic(node.args[0])


def dynamic(argument: ast.expr) -> Iterator[str]:
    """The constant head of what ``import_module`` is given; an f-string without one cannot be judged."""
    head = argument.values[0] if isinstance(argument, ast.JoinedStr) and argument.values else argument
    if isinstance(head, ast.Constant) and isinstance(head.value, str):
        yield head.value.rstrip(".")


def within(name: str, room: str) -> bool:
    """Whether a dotted name is a room or lies in it."""
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> str:
    """The entry of MAY_IMPORT that a module of llmir belongs to."""
    return max((room for room in MAY_IMPORT if within(name, room)), key=len)


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the rules let one module of llmir import another (or a name in it)."""
    home, target = room_of(importer), room_of(imported)
    if home == target:
        return not within(importer, "llmir.frontends") or imported.split(".")[2] in ("common", importer.split(".")[2])
    return any(target == room or (room != "llmir" and within(target, room)) for room in MAY_IMPORT[home])


def imports_of(name: str) -> set[str]:
    """What a module of llmir imports."""
    file = MODULES[name]
    return set(imports(file.read_text(), name, is_package=file.name == "__init__.py"))


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_the_rooms_it_may(name):
    inside = {imported for imported in imports_of(name) if within(imported, "llmir")}
    assert [imported for imported in sorted(inside) if not is_allowed(name, imported)] == []


def loaded_with(name: str) -> set[str]:
    """The modules of llmir that importing one module begins with: not what functions import, or types alone."""
    file = MODULES[name]
    statements = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = imports("\n".join(map(ast.unparse, statements)), name, is_package=file.name == "__init__.py")
    modules = {one if one in MODULES else one.rpartition(".")[0] for one in found}  # else it is a name in a module
    return {module for module in modules if module in MODULES}


def test_no_module_imports_itself_through_others():
    left = {name: loaded_with(name) - {name} for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert sorted(left) == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(package):
    importers = {name for name in MODULES if any(within(imported, package) for imported in imports_of(name))}
    assert {name for name in importers if not any(within(name, home) for home in ONLY_IN[package])} == set()


@pytest.mark.parametrize("module", SERVING)
def test_serving_loads_neither_bindings_nor_framework(module):
    code = f"import sys, {module}; print(*(m for m in {[*ONLY_IN]} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "package", ["llmir.ir", "llmir.kernels", "llmir.kernels.cpu", "llmir.frontends", "llmir.frontends.common"]
)
def test_package_itself_imports_nothing(package):
    assert imports_of(package) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import llmir.plan as p, torch", {"llmir.plan", "torch"}),
        ("from llmir.ir import build", {"llmir.ir.build"}),
        ("from . import b", {"llmir.a.b"}),
        ("from .b import c", {"llmir.a.b.c"}),
        ("from ..ir import types", {"llmir.ir.types"}),
        ("def f():\n    from torch import nn", {"torch.nn"}),
        ("import importlib\nimportlib.import_module('torch.nn')", {"importlib", "torch.nn"}),
        ("__import__(f'llmir.frontends.{x}.y')", {"llmir.frontends"}),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert set(imports(source, "llmir.a.m")) == expected


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("llmir.targets.x86.tiles", "llmir.ir.kernel_spec.CpuVariant", True),
        ("llmir.targets.x86.tiles", "llmir.ir.types", False),
        ("llmir.ir.ranges", "llmir.targets.registry.isas", True),
        ("llmir.ir.ranges", "llmir.targets.x86.isa", False),
        ("llmir.runtime.sharing", "llmir.costs.sharing.Readers", True),
        ("llmir.runtime.sharing", "llmir.costs.model", False),
        ("llmir.targets.x86.tiles", "llmir.kernels.cpu.builder", False),
        ("llmir.cli.check", "llmir.kernels.gpu.toolchain.require", True),
        ("llmir.cli.check", "llmir.kernels.gpu.ahead", False),
        ("llmir.plan", "llmir.ir.kernel_spec", True),
        ("llmir.plan", "llmir.ir.types", False),
        ("llmir.runtime.layers", "llmir.plan", True),
        ("llmir.runtime.schedule", "llmir.targets.x86.tiles", False),
        ("llmir.ir.types", "llmir.plan", False),
        ("llmir.compiler", "llmir.frontends.vllm", False),
        ("llmir.frontends.sglang.backend", "llmir.frontends.vllm.backend", False),
        ("llmir.frontends.vllm.backend", "llmir.frontends.sglang.backend", False),
        ("llmir.frontends.vllm.backend", "llmir.frontends.vllm.plugin", True),
        ("llmir.frontends.vllm.backend", "llmir.frontends.common.options", True),
        ("llmir.frontends.common.planning", "llmir.frontends.vllm.support", False),
        ("llmir.compare.worker", "llmir.frontends.vllm.plugin", False),
        ("llmir.compiler", "llmir.__version__", True),
    ],
)
def test_the_rules_say_what_they_mean(importer, imported, allowed):
    assert is_allowed(importer, imported) is allowed
