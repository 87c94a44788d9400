"""llmir on a GPU, one command: are its kernels right, and how fast are they beside the best peers?

    python benchmarks/gpu.py --json results.json --chart results.png

Everything happens in one process with the same inputs: every kernel against float64; the copy bandwidth and the rate of
a large bf16 matrix product, which no kernel can beat; then decode, prefill, ragged mixes and shared prefixes, llmir and
its peers in turn. Exit status 1: an answer of llmir's was wrong. `--seconds` bounds the run: where it is short, cases
are measured with fewer repeats, then left out, which the output says.

It needs torch, triton and numpy, no MLIR: the plans in benchmarks/plans were made before, by the same passes that serve
a model. It runs from a checkout without installation.

Peers are taken as they are installed, or from a folder carried to a machine without a network, where only what is
named here has to lie, out of the projects' wheels (pip download --no-deps; releases for torch 2.11 in brackets):

    vllm/_version.py, vllm/v1/attention/ops, vllm/vllm_flash_attn/*.py      vLLM (0.26.0): `unified_attention`, and what
                                                                            calls FlashAttention; 0.5 MB
    _vllm_fa3_C.abi3.so.xz     of vllm/vllm_flash_attn, packed by `xz -6`: 11 MB of 153; --fa3 takes either
    sglang/_version.py, sglang/kernels/ops/attention                        SGLang (0.5.17); 4 MB
    flashinfer                 FlashInfer (0.6.14) after on_gpu/flashinfer_peer.py has compiled what is needed, which
                               leaves data/cutlass and data/cccl dispensable; 24 MB. It imports apache-tvm-ffi

    PYTHONPATH=FOLDER_OF_TVM_FFI python benchmarks/gpu.py --vllm-source peers --sglang-source peers \
        --flashinfer peers --fa3 peers/_vllm_fa3_C.abi3.so.xz --json results.json --chart results.png

`--tune` times tile sizes instead of cases. `--interpret` runs the whole on a CPU in Triton's interpreter with tiny
shapes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that came out here")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the rows here (.png, .svg or .pdf)")
    parser.add_argument("--seconds", type=float, default=450.0, help="how long it may take in all")
    parser.add_argument("--seed", type=int, help="of the random inputs; drawn anew each run unless given")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="plans of the kernels; by default those of the GPU")
    parser.add_argument("--only", choices=["correctness", "speed"], help="one part alone")
    parser.add_argument("--case", metavar="TEXT", help="only cases and checks whose names contain this")
    parser.add_argument("--tune", action="store_true", help="time tile sizes, and say which are fastest")
    parser.add_argument("--interpret", action="store_true", help="run in Triton's interpreter on the CPU, tiny shapes")
    parser.add_argument("--vllm-source", type=Path, metavar="DIR", help="folder that holds vllm/")
    parser.add_argument("--sglang-source", type=Path, metavar="DIR", help="folder that holds sglang/")
    parser.add_argument("--flashinfer", type=Path, metavar="DIR", help="folder that holds flashinfer/")
    parser.add_argument("--fa3", type=Path, metavar="FILE", help="vLLM's _vllm_fa3_C.abi3.so, packed by xz or not")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(1 << 31)
    return arguments


def main() -> None:
    """Parses, prepares the process, runs."""
    arguments = parsed()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    sys.path.insert(0, str(ROOT))
    from on_gpu.session import session

    from llmir.errors import LlmirError

    try:
        sys.exit(session(arguments))
    except LlmirError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
