"""What a cache key says about llmir's own source: one digest of a module and of everything of llmir it imports.

The modules are found by reading their import statements. Nothing is imported: a serving process makes keys of objects,
and must load neither the generators that wrote them nor MLIR.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from llmir.errors import KernelError

#: The folder of the package llmir.
PACKAGE = Path(__file__).parents[1]


@cache
def closure_digest(module: str, package: Path = PACKAGE) -> str:
    """sha256 over the sources of ``module`` and of what it imports (see :func:`import_closure`)."""
    return files_digest(import_closure(module, package).values(), package)


def files_digest(files: Iterable[Path], root: Path) -> str:
    """sha256 over the contents of ``files`` and their names below ``root``, in any order."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        content = path.read_bytes()
        # The length keeps the end of one file apart from the beginning of the next.
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def import_closure(module: str, package: Path = PACKAGE) -> Mapping[str, Path]:
    """``module`` and every module of its package that it can import, directly or through others, with their files.

    ``package`` is the folder of the top-level package that ``module`` begins with. Imports inside functions count, and
    so do the packages that a module lies in, because their ``__init__`` runs first. Left out are imports under ``if
    TYPE_CHECKING``, which never run, and names given to ``importlib``, which cannot be read. Raises KernelError where
    the source of a module is missing: a digest would not cover it.
    """
    found: dict[str, Path] = {}
    wanted = [module]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        file = _source_file(name, package)
        if file is None:
            raise KernelError(
                f"{name} has no source below {package}, and cached kernels are known by their generators' sources: "
                f"install llmir with its sources"
            )
        found[name] = file
        parent = name.rpartition(".")[0]
        if parent and _source_file(parent, package):  # a package without an __init__ runs nothing
            wanted.append(parent)
        wanted += _imports(file, name, package)
    return found


def _imports(file: Path, name: str, package: Path) -> Iterator[str]:
    """The modules of the same top-level package that the module ``name`` imports; some more than once."""
    home = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for statement in _statements(ast.parse(file.read_bytes(), str(file)).body):
        if isinstance(statement, ast.Import):
            imported = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = _absolute(statement, home)
            # A name is a submodule, or else something inside the module.
            both = ((f"{base}.{alias.name}", base) for alias in statement.names)
            imported = [
                inner if _ours(inner, name) and _source_file(inner, package) else outer for inner, outer in both
            ]
        else:
            continue
        yield from (target for target in imported if _ours(target, name))


def _absolute(statement: ast.ImportFrom, home: str) -> str:
    """The module that a ``from`` statement in package ``home`` names, its leading dots resolved."""
    if not statement.level:
        return statement.module or ""
    above = home.split(".")[: len(home.split(".")) - statement.level + 1]
    return ".".join([*above, *filter(None, [statement.module])])


def _ours(imported: str, importer: str) -> bool:
    """Whether both are in one top-level package."""
    return imported.partition(".")[0] == importer.partition(".")[0]


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements of a module that can run, at any depth; no expressions, which hold no imports."""
    for node in body:
        yield node
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for part in ("orelse",) if typing_only else ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _statements(getattr(node, part, ()))


def _source_file(name: str, package: Path) -> Path | None:
    """The file of the module ``name``; None where there is none."""
    place = package.joinpath(*name.split(".")[1:])
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in candidates if file.is_file()), None)
