"""One run of benchmarks/gpu.py: its parts in order, and what is written down."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

import llmir
from llmir.errors import LlmirError
from on_gpu import report
from on_gpu.batches import Batch, timed, timed_tiny
from on_gpu.checks import checks
from on_gpu.compile import compile_all
from on_gpu.correctness import run_checks
from on_gpu.files import check_writable, commit, write_json
from on_gpu.llmir_side import PLANS, Plans, target_of
from on_gpu.peer import Sources
from on_gpu.peers import Peers
from on_gpu.speed import Bench
from on_gpu.step import PLAIN, Features
from on_gpu.timing import Budget, ceilings

#: Of the whole time, what correctness may take.
CHECKS_PART = 0.35


def session(arguments: argparse.Namespace) -> int:
    """Runs and writes; 1 where an answer of llmir's was wrong."""
    for path in filter(None, (arguments.json, arguments.chart)):
        check_writable(path)
    if arguments.chart:
        report.check_format(arguments.chart)
    budget = Budget(arguments.seconds)
    device = chosen_device(arguments.interpret)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    plans = Plans(arguments.plans or PLANS / target_of(device))
    result: dict[str, Any] = {"environment": environment(device), "seed": arguments.seed, "plans": plans.names}
    print(f"{result['environment']['device']}, seed {arguments.seed}", flush=True)
    if arguments.tune:
        from on_gpu.tune import tune

        result["tuned"] = tune(plans, device, generator, budget, arguments.interpret)
        failed = False
    else:
        failed = measured(arguments, plans, device, generator, budget, result)
    result["seconds"] = round(budget.used, 1)
    print(f"{budget.used:.0f} s")
    if arguments.json:
        write_json(arguments.json, result)
    return int(failed)


def measured(
    arguments: argparse.Namespace,
    plans: Plans,
    device: torch.device,
    generator: torch.Generator,
    budget: Budget,
    result: dict[str, Any],
) -> bool:
    """Correctness, ceilings, speed; whether an answer of llmir's was wrong."""
    failed, tiny = False, arguments.interpret
    # In the interpreter, products of bf16 are wrong in kernels that do not know of it, as peers' do not.
    features = Features("f16") if tiny else PLAIN
    chosen = [check for check in checks(plans.block_size, tiny) if wanted(arguments, check.name)]
    batches = [b for b in (timed_tiny() if tiny else timed()) if wanted(arguments, f"{b.name} {b.shape}")]
    if not chosen and not batches:
        raise LlmirError(f"no case has {arguments.case!r} in its name: the names are in the table of a whole run")
    if not tiny:
        kernels = [plans.kernel(check.batch.shape, check.features) for check in chosen]
        kernels += [plans.kernel(batch.shape, features) for batch in batches]
        print(f"{compile_all(kernel.spec for kernel in kernels)} programs compiled, {budget.used:.0f} s", flush=True)
    if arguments.only != "speed":
        rows, left_out = run_checks(chosen, plans, device, generator, Budget(CHECKS_PART * arguments.seconds))
        report.print_checks(rows, left_out)
        result["correctness"] = {"rows": rows, "left_out": left_out}
        failed = any(row["problems"] for row in rows)
    if arguments.only != "correctness":
        result["ceilings"] = ceilings(device, tiny)
        report.print_ceilings(result["ceilings"])
        peers = Peers.find(sources(arguments), device)
        result["peers"] = {peer.name: peer.version for peer in peers.present}
        result["absent_peers"] = peers.absent
        bench = Bench(device, plans, peers, result["ceilings"], budget, generator, tiny, features)
        result |= {"rows": bench.rows, "left_out": bench.left_out, "wrong": bench.wrong}

        def done(batch: Batch, rows: list[dict[str, Any]]) -> None:
            report.print_batch(batch, rows)
            if arguments.json:  # a run that is cut off leaves what it has measured
                write_json(arguments.json, result)

        bench.run(batches, done)
        report.print_left_out(bench.left_out, peers.absent)
        if bench.rows:
            if tiny:
                print("in the interpreter times mean nothing:")
            report.print_table(bench.rows)
            report.print_host(bench.rows)
            if arguments.chart:
                report.draw(bench.rows, arguments.chart, result["environment"]["device"])
        failed = failed or bool(bench.wrong)
    return failed


def wanted(arguments: argparse.Namespace, name: str) -> bool:
    """Whether ``--case`` lets a case through."""
    return arguments.case is None or arguments.case in name


def sources(arguments: argparse.Namespace) -> Sources:
    """What the options name; LlmirError where it is not there."""
    named = Sources(arguments.vllm_source, arguments.sglang_source, arguments.flashinfer, arguments.fa3)
    folders = {"vllm": named.vllm, "sglang": named.sglang, "flashinfer": named.flashinfer}
    for package, folder in folders.items():
        if folder and not (folder / package).is_dir():
            raise LlmirError(
                f"{str(folder)!r} holds no folder {package!r}: name the one that its wheel was unpacked in"
            )
    if named.fa3 and not named.fa3.is_file():
        raise LlmirError(f"there is no file {str(named.fa3)!r}: name _vllm_fa3_C.abi3.so of vLLM's wheel")
    return named


def chosen_device(interpret: bool) -> torch.device:
    """The GPU, or the CPU for the interpreter; LlmirError where there is no GPU."""
    if interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LlmirError("torch sees no GPU here: run this where there is one, or try it out with --interpret")
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, machine, commit."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(Path(llmir.__file__).parent.parent),
        "device": f"{platform.processor() or platform.machine()}, Triton's interpreter",
        "versions": {
            "llmir": llmir.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "memory_bytes": properties.total_memory,
        }
    return found


def driver() -> str | None:
    """The driver's version, from nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None
