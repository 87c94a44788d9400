"""What a feature of attention costs in decode: the kernel that has it against the plain one over the same keys.

python benchmarks/attention_features.py --json attention-features.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from attention_step import DTYPE_NAMES, VLLM_BLOCK_SIZE, Step
from decode_attention import CASES
from llmir_attention import LlmirAttention
from side_by_side import interleaved

from llmir.ir.attention_spec import Alibi, AttentionSpec, Mask, SoftCap

FEATURES: dict[str, Callable[[AttentionSpec], AttentionSpec]] = {
    "plain": lambda attention: attention,
    "sinks": lambda attention: replace(attention, sinks=True),
    "alibi": lambda attention: replace(attention, score_stages=(Alibi(),)),
    "soft cap": lambda attention: replace(attention, score_stages=(SoftCap(30.0),)),
    "window as long as the context": lambda attention: replace(attention, mask=Mask(window=1 << 20)),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", default=list(DTYPE_NAMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each kernel, of which the median counts")
    arguments = parser.parse_args()
    rows = []
    for base in CASES:
        for dtype in arguments.dtype:
            case = replace(base, element_type=DTYPE_NAMES[dtype])
            step = Step.random(case)
            sides = {name: LlmirAttention(step, VLLM_BLOCK_SIZE, change=change) for name, change in FEATURES.items()}
            runners = {name: side.runner(arguments.threads) for name, side in sides.items()}
            seconds = interleaved(runners, arguments.threads, arguments.repeats)
            for name, median in seconds.items():
                ratio = median / seconds["plain"]
                rows.append({"case": case.name, "dtype": dtype, "feature": name, "seconds": median, "ratio": ratio})
                print(f"{case.name:8} {dtype:9} {name:30} {median * 1e3:8.2f} ms  {ratio:5.3f} of plain", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
