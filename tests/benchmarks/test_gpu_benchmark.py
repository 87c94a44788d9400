"""The benchmark of GPU kernels, run in Triton's interpreter."""

import json
import sys

import gpu
import pytest
import torch
from on_gpu import correctness, report, speed
from on_gpu.batches import TINY, Batch, Shape
from on_gpu.checks import Check
from on_gpu.correctness import Checker
from on_gpu.llmir_side import Plans, fitted
from on_gpu.speed import shares
from on_gpu.step import PLAIN, Features
from on_gpu.timing import Budget, HostClock, Rounds, interleaved, spread
from plan_file import POLICY, SIGNATURE, VARIANTS, write_plan

from llmir.errors import PlanError
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Runs ``gpu.py --interpret ARGUMENTS`` with a plan of small tiles: exit code, and what it wrote."""
    write_plan(tmp_path)

    def benchmark(*arguments):
        written = tmp_path / "written.json"
        command = ["gpu.py", "--interpret", "--plans", tmp_path, "--json", written, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return ended.value.code, json.loads(written.read_text()) if written.exists() else None

    return benchmark


def test_kernels_are_checked(benchmark):
    code, written = benchmark("--only", "correctness", "--case", "prefix tree")
    assert (code, [row["problems"] for row in written["correctness"]["rows"]]) == (0, [[]])


def test_both_ways_of_a_shared_prefix_are_timed(benchmark):
    code, written = benchmark("--only", "speed", "--case", "shared")
    assert (code, [row["side"] for row in written["rows"]]) == (0, ["llmir", "llmir, sharing off"])


def test_a_case_that_there_is_not_is_refused(benchmark):
    code, _ = benchmark("--case", "nothing")
    assert "no case has 'nothing' in its name" in code


def test_cases_that_there_is_no_time_for_are_named(benchmark):
    code, written = benchmark("--only", "speed", "--case", "decode", "--seconds", "0")
    assert (code, [each["reason"] for each in written["left_out"]]) == (0, ["no time was left"])


def test_tiles_are_tried(benchmark):
    _, written = benchmark("--tune")
    assert all("seconds" in row for row in written["tuned"][0]["rows"])


def test_a_folder_without_plans_is_refused(tmp_path):
    with pytest.raises(PlanError, match="--plans"):
        Plans(tmp_path)


def test_a_plan_for_this_attention_is_taken_as_it_is(tmp_path):
    write_plan(tmp_path)
    planned = Plans(tmp_path).kernel(TINY)
    assert (planned.spec.variants, planned.policy, planned.source) == (VARIANTS, POLICY, "tiny")


def test_a_plan_for_another_attention_says_so(tmp_path):
    write_plan(tmp_path)
    assert Plans(tmp_path).kernel(TINY, Features(window=3)).source == "like tiny"


def test_tiles_are_fitted_to_larger_heads_and_groups(tmp_path):
    write_plan(tmp_path)
    attention = Plans(tmp_path).kernel(Shape("large", 32, 1, 256)).spec.attention
    variant = fitted(VARIANTS[1], attention, SIGNATURE.head_size)
    assert (variant.row_tile, variant.key_chunk, variant.max_tokens) == (32, 16, 1)


class Wrong(GpuAttentionRunner):
    """A runner that does something else after each call."""

    change = staticmethod(lambda query, output, cache: None)

    def attend(self, query, key, value, output, cache, *rest, **scales):
        super().attend(query, key, value, output, cache, *rest, **scales)
        self.change(query, output, cache)


CHECK = Check(Batch("decode", TINY, (1, 1), (5, 18)), PLAIN)


def problems(tmp_path, monkeypatch, change, check=CHECK):
    """What a check finds of kernels that do ``change``."""
    monkeypatch.setattr(Wrong, "change", staticmethod(change))
    monkeypatch.setattr(correctness, "GpuAttentionRunner", Wrong)
    write_plan(tmp_path)
    checker = Checker(Plans(tmp_path), CPU, torch.Generator().manual_seed(1), StepLimits(2, 2))
    return checker.run(check)["problems"]


def test_right_kernels_have_no_problems(tmp_path, monkeypatch):
    assert problems(tmp_path, monkeypatch, lambda query, output, cache: None) == []


def test_an_output_that_was_not_written_is_found(tmp_path, monkeypatch):
    found = problems(tmp_path, monkeypatch, lambda query, output, cache: output[0].fill_(torch.nan))
    assert found[0].startswith("relative error nan")


def test_an_error_of_one_head_is_found(tmp_path, monkeypatch):
    found = problems(tmp_path, monkeypatch, lambda query, output, cache: output[1, 3].mul_(1.05))
    assert "worst row 5." in found[0]


def test_a_write_to_anothers_slot_is_found(tmp_path, monkeypatch):
    found = problems(tmp_path, monkeypatch, lambda query, output, cache: cache[-1].zero_())
    assert found == ["the cache is not what it must be after appending"]


def test_a_check_that_checks_nothing_is_found(tmp_path, monkeypatch):
    check = Check(CHECK.batch, PLAIN, shares=True)
    found = problems(tmp_path, monkeypatch, lambda query, output, cache: None, check)
    assert found == ["nothing was shared, which was to be checked"]


class Side:
    """One that attends to a layer by writing its number."""

    def __init__(self, name):
        self.name, self.output, self.layers = name, torch.empty(2), []

    def prepare(self):
        pass

    def run(self, layer):
        self.layers.append(layer)
        self.output.fill_(layer)


class FirstLayer:
    """A step whose first layer's answer is known."""

    def errors(self, output):
        return (float(output.abs().max()),) * 2


def test_only_graphs_whose_replay_is_right_are_timed(monkeypatch):
    right, stale = Side("right"), Side("stale")

    def captured(run):
        run()
        return (lambda: None) if run.args[0] is stale else run

    monkeypatch.setattr(speed, "captured", captured)
    bench = speed.Bench(CPU, None, None, {}, Budget(60), torch.Generator(), tiny=True)
    graphs = bench._graphs(CHECK.batch, FirstLayer(), [("llmir", stale), ("llmir", right)], layers=3, calls=4)
    assert list(graphs) == ["right"]
    assert right.layers == [0, 1, 2, 0] * 2
    assert [(row["side"], row["problem"].split(":")[0]) for row in bench.wrong] == [("stale", "wrong when replayed")]


def test_every_side_is_timed_equally_often_after_the_warm_up():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(sides, HostClock(), 0, Rounds(least=4, most=9, warm_up=1))
    assert (sorted(calls), [len(each) for each in times.values()]) == (["a"] * 5 + ["b"] * 5, [4, 4])


def test_a_times_spread_is_of_one_call():
    assert spread([2.0, 4.0, 6.0], calls=2) == {
        **{"seconds": 2.0, "lower": 1.5, "upper": 2.5, "least": 1.0},
        **{"rounds": 3, "calls": 2},
    }


def test_the_ceiling_is_what_allows_less():
    batch = Batch("decode", TINY, (1,), (1000,))
    rates = {"copy_bytes_per_second": batch.moved_bytes, "bf16_flops_per_second": 100 * batch.flops}
    assert shares(batch, 2.0, rates) == {
        **{"bandwidth_share": 0.5, "product_share": 0.005, "ceiling": "copy bandwidth", "share": 0.5},
    }


def row(**fields):
    """A row of a result."""
    return {"case": "c", "shape": "s", "mode": "graph", "share": 0.5, "best_peer": None, "ratio": None} | fields


def test_the_table_shows_the_best_of_each_peer():
    rows = [
        row(side="llmir", family="llmir", seconds=2e-6, best_peer="P 2", ratio=1.5),
        row(side="P 1", family="P", seconds=4e-6),
        row(side="P 2", family="P", seconds=3e-6),
    ]
    assert report.table(rows)[1] == ["c", "s", "graph", "2.0", "50%", "", "3.0", "1.50x"]


def test_the_host_is_left_out_where_a_graph_was_timed():
    rows = [row(side="llmir", family="llmir", mode=mode, seconds=1e-6) for mode in ("stream", "graph")]
    assert [shown["mode"] for shown in report.told(rows)] == ["graph"]


def test_without_rich_the_table_is_plain(monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.print_table([row(side="llmir", family="llmir", seconds=2e-6)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["c", "s", "graph", "2.0", "50%", "-"]


def test_a_chart_of_an_unknown_format_is_refused_before_the_run(benchmark, tmp_path):
    code, _ = benchmark("--chart", tmp_path / "chart.txt")
    assert "choose from .png, .svg, .pdf" in code


def test_a_chart_is_drawn(tmp_path):
    rows = [row(side="llmir", family="llmir", seconds=2e-6), row(side="P", family="P", seconds=4e-6)]
    report.draw(rows, tmp_path / "chart.svg", "title")
    assert (tmp_path / "chart.svg").read_text().lstrip().startswith("<?xml")
