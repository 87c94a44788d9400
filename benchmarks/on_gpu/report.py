"""The result of benchmarks/gpu.py for people: lines while it runs, a table at the end, a chart."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmir.errors import LlmirError
from on_gpu.batches import Batch
from on_gpu.files import write_whole
from on_gpu.llmir_side import SHARING_OFF, SHARING_ON
from on_gpu.speed import GRAPH, LLMIR, STREAM

Row = dict[str, Any]
_FORMATS = (".png", ".svg", ".pdf")
#: Inches.
_CHART_WIDTH, _BAR_HEIGHT, _MARGIN = 10.0, 0.16, 1.2


def print_checks(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """How many checks there were, and every one that failed."""
    failed = [row for row in rows if row["problems"]]
    errors = [row["relative_error"] for row in rows if "relative_error" in row]
    worst = f", largest relative error {max(errors):.1e}" if errors else ""
    print(f"correctness: {len(rows) - len(failed)} of {len(rows)} checks hold{worst}")
    for row in failed:
        print(f"  FAILED {row['check']}: {'; '.join(row['problems'])}")
    if left_out:
        print(f"  no time was left for {len(left_out)}: {'; '.join(left_out)}")


def print_ceilings(ceilings: Row) -> None:
    """What the device can do."""
    print(
        f"ceilings: copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written), read "
        f"{ceilings['read_bytes_per_second'] / 1e12:.2f} TB/s, bf16 product "
        f"{ceilings['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )


def print_batch(batch: Batch, rows: Sequence[Row]) -> None:
    """One line when a batch is done."""
    for row in told(rows):
        best = f", {row['best_peer']} {row['ratio']:.2f}x" if row["best_peer"] else ""
        print(
            f"  {batch.name} {batch.shape}: {micro(row['seconds'])} µs, {row['share']:.0%} of {row['ceiling']}{best}",
            flush=True,
        )


def told(rows: Sequence[Row]) -> list[Row]:
    """llmir's row of each case: from a CUDA graph where there is one, which leaves the host out."""
    ours = [row for row in rows if row["side"] == SHARING_ON]
    graphs = {(row["case"], row["shape"]) for row in ours if row["mode"] == GRAPH}
    return [row for row in ours if row["mode"] == GRAPH or (row["case"], row["shape"]) not in graphs]


def families(rows: Sequence[Row]) -> list[str]:
    """Whose kernels were timed, llmir left out."""
    return list(dict.fromkeys(row["family"] for row in rows if row["family"] != LLMIR))


def best_of(rows: Sequence[Row], like: Row, family: str) -> Row | None:
    """The fastest row of a family in the case and mode of ``like``."""
    where = (like["case"], like["shape"], like["mode"])
    found = [r for r in rows if r["family"] == family and (r["case"], r["shape"], r["mode"]) == where]
    return min(found, key=lambda row: row["seconds"], default=None)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Times in µs, a line a case: the header first."""
    peers = families(rows)
    lines = [["case", "shape", "by", "llmir", "of ceiling", "sharing off", *peers, "best peer / llmir"]]
    for row in told(rows):
        off = [r for r in rows if r["side"] == SHARING_OFF and (r["case"], r["mode"]) == (row["case"], row["mode"])]
        times = [best_of(rows, row, family) for family in peers]
        lines.append(
            [
                row["case"],
                row["shape"],
                row["mode"],
                micro(row["seconds"]),
                f"{row['share']:.0%}",
                micro(off[0]["seconds"]) if off else "",
                *(micro(best["seconds"]) if best else "-" for best in times),
                f"{row['ratio']:.2f}x" if row["ratio"] else "-",
            ]
        )
    return lines


def print_table(rows: Sequence[Row]) -> None:
    """The table, by rich where it is installed."""
    header, *lines = table(rows)
    if not find_spec("rich"):
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in (header, *lines):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*header, title="µs a layer; the best of each peer's ways")
    for line in lines:
        drawn.add_row(*line)
    # Its own width: what a terminal would wrap stays in one piece in a log.
    Console(width=max(80, sum(max(map(len, column)) + 3 for column in zip(header, *lines, strict=True)) + 1)).print(
        drawn
    )


def print_host(rows: Sequence[Row]) -> None:
    """What the host does once a step."""
    print("host time of preparing a step, µs, least to most over the cases; no part of the times above:")
    for key, text in (("prepare_seconds", ""), ("prepare_changed_seconds", ", blocks unlike the last step's")):
        seen: dict[str, list[float]] = {}
        for row in rows:
            if row["mode"] == STREAM and key in row:
                seen.setdefault(row["side"], []).append(row[key])
        for side, seconds in seen.items():
            print(f"  {side}{text}: {micro(min(seconds))} to {micro(max(seconds))}")


def print_left_out(left_out: Sequence[dict[str, str]], absent: dict[str, str]) -> None:
    """What was not measured, and why."""
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    for each in left_out:
        print(f"left out: {each['case']} {each['shape']}, {each['side']}: {each['reason']}")


def check_format(path: Path) -> None:
    """Raise LlmirError if the suffix of ``path`` names no format of a chart."""
    if path.suffix not in _FORMATS:
        raise LlmirError(f"cannot draw {path}: its suffix names no picture format; choose from {', '.join(_FORMATS)}")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A picture at ``path``: of each case, how near llmir and the best of every peer come to the ceiling."""
    if not find_spec("matplotlib"):
        print(f"no {path}: matplotlib is not installed")
        return
    from matplotlib.figure import Figure

    shown, peers = told(rows), families(rows)
    sides = [LLMIR, *peers]
    height = len(shown) * (len(sides) + 1) * _BAR_HEIGHT + _MARGIN
    figure = Figure(figsize=(_CHART_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for number, family in enumerate(sides):
        found = [(at, row if family == LLMIR else best_of(rows, row, family)) for at, row in enumerate(shown)]
        bars = [(at * (len(sides) + 1) + number, row["share"]) for at, row in found if row]
        axes.barh([at for at, _ in bars], [share for _, share in bars], height=0.9, label=family)
    middles = [at * (len(sides) + 1) + (len(sides) - 1) / 2 for at in range(len(shown))]
    axes.set_yticks(middles, [f"{row['case']}  {row['shape']}" for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("part of what the measured copy bandwidth or matrix product allows, whichever allows less")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=100))


def micro(seconds: float) -> str:
    """Seconds as µs with three digits."""
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"
