"""One model read from SGLang and from vLLM: to the compiler, and to its caches, it is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmir import compiler
from llmir.frontends.sglang.importer import configure, import_module
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.module import ops_of
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.workload import DEFAULT

VLLM = Path(__file__).parents[2] / ".venvs" / "vllm" / "bin" / "python"
#: Pages of this many tokens are allowed by both.
BLOCK_SIZE = 64
READ_BY_VLLM = """
import sys
from pathlib import Path
from llmir import compiler
from llmir.frontends.vllm.importer import import_module
from llmir.frontends.vllm.offline import configure
from llmir.targets.machine import Target
from llmir.workload import DEFAULT
model, block_size, cache, output = sys.argv[1:]
module = import_module(configure(model, block_size=int(block_size)))
plan = compiler.compile(module, Target.detect(), DEFAULT, compiler.Options(calibrate=False, cache=Path(cache)))
plan.write(Path(output))
"""


@pytest.fixture(scope="module")
def plans(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Plan, Path]:
    """SmolLM2's plans through SGLang and through vLLM, and the one cache that both compiled into."""
    if not VLLM.exists():
        pytest.skip("no environment with vLLM: run `make .venvs/vllm` first")
    cache, output = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("plan") / "plan.json"
    module = import_module(configure(model_path=smollm2, skip_tokenizer_init=True, page_size=BLOCK_SIZE))
    assert len({spec_of(op) for op in ops_of(module, PagedAttention)}) == 1
    options = compiler.Options(calibrate=False, cache=cache)
    from_sglang = Plan.loads(compiler.compile(module, Target.detect(), DEFAULT, options).dumps())
    command = [VLLM, "-c", READ_BY_VLLM, smollm2, str(BLOCK_SIZE), str(cache), str(output)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG")}
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, env=environment)
    return from_sglang, Plan.read(output), cache


def test_same_model_through_both_frameworks(plans: tuple[Plan, Plan, Path]) -> None:
    from_sglang, from_vllm, _ = plans
    assert (from_sglang.framework, from_vllm.framework) == ("sglang", "vllm")
    assert from_sglang.kernels == from_vllm.kernels, "signatures, tiles, policies, layers, and keys of the objects"
    same = ("block_size", "layout", "element_type", "fused")
    assert [getattr(from_sglang, name) for name in same] == [getattr(from_vllm, name) for name in same]


def test_both_get_the_same_decisions(plans: tuple[Plan, Plan, Path]) -> None:
    from_sglang, from_vllm, _ = plans
    assert [(d.pass_name, d.subject, d.decision) for d in from_sglang.decisions] == [
        (d.pass_name, d.subject, d.decision) for d in from_vllm.decisions
    ]


def test_a_kernel_is_compiled_once_for_both(plans: tuple[Plan, Plan, Path]) -> None:
    from_sglang, _, cache = plans
    assert len(list(cache.rglob("*.o"))) == len(from_sglang.kernels)
