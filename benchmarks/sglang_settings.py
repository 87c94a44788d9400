"""Which settings serve fastest with SGLang on this machine? Real SGLang, without llmir, one setting after another.

    .venvs/sglang/bin/python benchmarks/sglang_settings.py --model models/smollm2-135m-instruct --json FILE

Each setting differs from the base in one thing and serves 16 requests of 1024 tokens in, 16 out, in a process of its
own. The last one has the best of each kind together. What wins is what `llmir compare sglang` compares llmir against
(llmir/compare/frameworks/sglang.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmir.child import python
from llmir.compare import CompareOptions
from llmir.compare.environment import child_environment
from llmir.compare.files import write_json
from llmir.compare.frameworks import FRAMEWORKS
from llmir.compare.job import Result
from llmir.compare.machine import record
from llmir.compare.measuring import figures
from llmir.compare.process import run_worker
from llmir.errors import LlmirError

WORKLOAD = "brief"
#: Settings are ranked by the seconds this many output tokens would take, prefill included: those of workload chat.
RANKED_TOKENS = 128
#: A setting must save this share to be more than noise, and so to be taken into the last setting.
WORTHWHILE = 0.03
TIMEOUT_SECONDS = 600.0

#: The kind that every other setting starts from: what SGLang does by itself on a CPU without AMX, said explicitly.
BASE_ARGUMENTS = {
    "attention_backend": "torch_native",
    "page_size": 1,
    "dtype": "bfloat16",
    "chunked_prefill_size": 4096,
}


@dataclass(frozen=True)
class Setting:
    """Engine arguments and environment variables on top of the base; an empty variable is removed."""

    kind: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


SETTINGS = (
    Setting("base", "torch_native, page size 1, bfloat16, chunks of 4096, all cores"),
    *(Setting("attention", name, {"attention_backend": name}) for name in ("flex_attention", "triton", "flashinfer")),
    *(Setting("page size", f"page size {size}", {"page_size": size}) for size in (16, 128)),
    Setting("dtype", "float32", {"dtype": "float32"}),
    Setting("threads", "1 thread", {}, {"OMP_NUM_THREADS": "1"}),
    *(Setting("chunks", f"chunks of {size}", {"chunked_prefill_size": size}) for size in (1024, 2048, 8192)),
    # SGLang sets memory aside by the size of a chunk, with this one more than there is.
    Setting("chunks", "chunks of 16384", {"chunked_prefill_size": 16384, "mem_fraction_static": 0.7}),
    Setting("schedule", "no overlap", {"disable_overlap_schedule": True}),
    Setting("schedule", "mixed chunks", {"enable_mixed_chunk": True}),
    Setting("compilation", "torch.compile", {"enable_torch_compile": True, "torch_compile_max_bs": 16}),
    Setting("OpenMP", "GNU OpenMP", {}, {"LD_PRELOAD": ""}),
    Setting("OpenMP", "threads sleep at once", {}, {"KMP_BLOCKTIME": "0"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--only", action="append", metavar="KIND", help="settings of this kind alone; may be repeated")
    arguments = parser.parse_args()
    asked = [setting for setting in SETTINGS if not arguments.only or setting.kind in ("base", *arguments.only)]
    print(f"{'setting':64} {'ms/token':>9} {'first token':>12} {'all first':>10} {'chat':>8}")
    rows = []
    for setting in asked:
        rows.append(measure(setting, arguments.model))
    together = best_of_each_kind(asked, rows)
    if together.arguments or together.environment:
        rows.append(measure(together, arguments.model))
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "environment": record()})
    best = min((row for row in rows if "failed" not in row), key=lambda row: row["chat_seconds"], default=None)
    if best is None:
        sys.exit("error: no setting runs; see the reasons above")
    print(f"best: {best['name']}")


def measure(setting: Setting, model: Path) -> dict[str, Any]:
    """Run one setting and print its line."""
    try:
        row = asdict(setting) | outcome(run(setting, model))
        seconds = (row[name] for name in ("time_to_first_token", "time_to_last_first_token", "chat_seconds"))
        first, last_first, chat = seconds
        figure = f"{1e3 * row['time_per_output_token']:9.1f} {first:10.2f} s {last_first:8.2f} s {chat:6.1f} s"
    except LlmirError as error:
        row = asdict(setting) | {"failed": str(error).splitlines()[0]}
        figure = f"failed: {row['failed']}"
    print(f"{setting.name[:64]:64} {figure}", flush=True)
    return row


def run(setting: Setting, model: Path) -> Result:
    """Serve with one setting in a process of its own; :class:`LlmirError` if SGLang cannot."""
    options = CompareOptions(
        model=str(model),
        framework="sglang",
        workloads=(WORKLOAD,),
        quality=False,
        engine=BASE_ARGUMENTS | setting.arguments,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    environment = child_environment(FRAMEWORKS["sglang"], options.model, Path(sys.prefix)) | setting.environment
    environment = {name: value for name, value in environment.items() if value}
    command = python("-m", "llmir.compare.worker")
    with tempfile.TemporaryDirectory(prefix="sglang-settings-") as folder:
        return run_worker(command, options, "baseline", False, environment, Path(folder, "run"), lambda line: None)


def outcome(result: Result) -> dict[str, Any]:
    """Figures in seconds; ``time_to_last_first_token`` is the prefill of all requests."""
    (records,) = result.runs[WORKLOAD]
    measured = figures(records)
    submitted = min(record.submitted for record in records)
    prefill = max(record.token_times[0] for record in records) - submitted
    step = measured["time_per_output_token"]
    return {
        "time_per_output_token": step,
        "time_to_first_token": measured["time_to_first_token"],
        "time_to_last_first_token": prefill,
        "chat_seconds": prefill + (RANKED_TOKENS - 1) * step,
        "load_average": os.getloadavg()[0],
        "settings": result.settings,
    }


def best_of_each_kind(asked: list[Setting], rows: list[dict[str, Any]]) -> Setting:
    """What beats the base by more than noise, the best of each kind, together."""
    chat = {row["name"]: row["chat_seconds"] for row in rows if "failed" not in row}
    base = chat.get(asked[0].name, float("inf"))
    winners: dict[str, Setting] = {}
    for setting in sorted((s for s in asked[1:] if s.name in chat), key=lambda s: chat[s.name]):
        if chat[setting.name] < (1 - WORTHWHILE) * base:
            winners.setdefault(setting.kind, setting)
    return Setting(
        "together",
        " + ".join(setting.name for setting in winners.values()),
        {name: value for setting in winners.values() for name, value in setting.arguments.items()},
        {name: value for setting in winners.values() for name, value in setting.environment.items()},
    )


if __name__ == "__main__":
    main()
