"""A kind of machine is a folder and a line of the registry: one that llmir never saw goes all the way to a plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmir import compiler
from llmir.errors import UnsupportedLayerError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import Layout, packed_layout
from llmir.ir.kernel_spec import CpuVariant
from llmir.ir.one_layer import LAYER, attention_module
from llmir.plan import Plan
from llmir.targets import registry
from llmir.targets.kernel_model import KernelModel
from llmir.targets.kind import Kind
from llmir.targets.machine import Target
from llmir.targets.records import Cache, Hardware, Measurements, TargetError
from llmir.workload import NAMED

FIGURES = Measurements(
    read_bandwidth=10e9,
    read_bandwidth_all=80e9,
    piece_bandwidth=((1024, 40e9), (1 << 20, 80e9)),
    cached_bandwidth=((1 << 17, 400e9), (1 << 26, 80e9)),
    bf16_rate=1e11,
    f32_rate=5e10,
    fork_join_seconds=1e-5,
    threads=8,
    origin="made up",
)


class Arm(Kind):
    """Vectors of four float32, narrower than any that there are kernels for."""

    prefix, machine, on_gpu, where = "arm", "aarch64", False, "on an Arm CPU"
    head_sizes, dtypes, score_stages = range(64, 129, 64), ("f32",), ()
    kernel_model = f"{__name__}.ArmKernels"
    isas = ("neon",)
    typical: ClassVar = {"neon": Hardware("neon", "aarch64", "Arm of a test", ("asimd",), 8, (Cache(1, 64 << 10, 1),))}
    published: ClassVar = {"neon": FIGURES}

    def lanes(self, isa: str) -> int:
        return 4

    def layouts(self, dtype: str) -> tuple[Layout, ...]:
        return packed_layout(dtype), "row"

    def runs(self, isa: str, host: Hardware) -> bool:
        return host.machine == self.machine and "asimd" in host.features


class ArmKernels(KernelModel[CpuVariant]):
    """Two rows by one group of keys; a row costs what its products do."""

    items_per_thread, merge_seconds, calls_saved_by_fusion = 4, 0.0, 1

    def layout(self, dtype: str, block_size: int) -> Layout:
        return packed_layout(dtype)

    def decode(self, attention: AttentionSpec) -> CpuVariant:
        return CpuVariant("decode", 1, 2, attention.cache.block_size, 2, 2, 0)

    def prefill(self, attention: AttentionSpec) -> CpuVariant:
        return CpuVariant("prefill", 16, 2, attention.cache.block_size, 2, 2, 0)

    def piece_bytes(self, attention: AttentionSpec) -> int:
        return attention.cache.head_block_bytes

    def gather_seconds(self, attention: AttentionSpec) -> float:
        return 0.0

    def row_key_seconds(self, attention: AttentionSpec, prefill: CpuVariant) -> float:
        return 4 * attention.head_size / self.figures.f32_rate

    def decode_row_key_seconds(self, attention: AttentionSpec, decode: CpuVariant, prefill: CpuVariant) -> float:
        return self.row_key_seconds(attention, prefill)

    def split_bandwidth(self) -> float:
        return self.figures.read_bandwidth

    def split_seconds(self, attention: AttentionSpec) -> float:
        return 1e-6

    def describe(self, variant: CpuVariant) -> str:
        return f"{variant.name} on Arm"

    def describe_tile(self, variant: CpuVariant) -> str:
        return f"{variant.row_tile} rows"

    def numbers(self, attention: AttentionSpec, decode: CpuVariant, prefill: CpuVariant) -> dict[str, Any]:
        return {}

    def alternatives(self, attention: AttentionSpec, prefill: CpuVariant) -> list[dict[str, Any]]:
        return []

    def reading(self, attention: AttentionSpec) -> dict[str, Any]:
        return {}


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Kind:
    """The registry has a line more."""
    kind = Arm()
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS, kind])
    return kind


def compiled(head_size: int = 64, dtype: str = "f32") -> Plan:
    module = attention_module("tiny", dtype, 4, 2, head_size, 32, 4096)
    return compiler.compile(module, Target.named("arm:neon"), NAMED["chat"], compiler.Options(calibrate=False))


def test_a_new_kind_is_compiled_for(arm: Kind) -> None:
    plan = compiled()
    (kernel,) = plan.kernels
    assert (kernel.spec.isa, plan.layout, plan.block_size, kernel.layers) == ("neon", "lane", 32, (LAYER,))
    assert plan.target_fingerprint == "aarch64-neon"
    assert any("on Arm" in decision.decision for decision in plan.decisions)
    assert Plan.loads(plan.dumps()).dumps() == plan.dumps()  # whose numbers are checked by the kind's lanes and layouts


def test_a_new_kind_refuses_in_its_own_words(arm: Kind) -> None:
    with pytest.raises(UnsupportedLayerError) as error:
        compiled(head_size=96, dtype="bf16")
    assert "multiples of 64 from 64 to 128 on an Arm CPU" in str(error.value)
    assert "queries of bf16 have no kernel on an Arm CPU; there are kernels for f32" in str(error.value)


def test_a_machine_of_a_new_kind_is_recognized(arm: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("Features\t: fp asimd\n")
    here = Target.detect(tmp_path)
    assert (here.isa, here.runnable, here.missing(), here.unused()) == ("neon", ("aarch64-neon",), "", "")
    assert here.figures.origin == "made up" and not here.runs("avx2")


def test_nobody_knows_a_kind_that_is_not_registered() -> None:
    with pytest.raises(TargetError, match="no target 'arm:neon'; use one of cpu, gpu, cpu:avx2"):
        Target.named("arm:neon")
    with pytest.raises(KeyError):
        registry.kind_of("neon")


@pytest.mark.parametrize("kind", registry.KINDS, ids=lambda kind: type(kind).__name__)
def test_a_kind_has_a_typical_machine_of_each_of_its_instruction_sets(kind: Kind) -> None:
    assert tuple(kind.typical) == tuple(kind.published) == kind.isas
    for isa, machine in kind.typical.items():
        assert (machine.isa, machine.machine) == (isa, kind.machine) and kind.runs(isa, machine)
        assert machine.cores == kind.published[isa].threads


def test_an_instruction_set_is_of_one_kind() -> None:
    assert set(Counter(registry.isas()).values()) == {1}
    assert [registry.kind_of(isa).on_gpu for isa in registry.isas()] == list(map(registry.is_gpu, registry.isas()))
