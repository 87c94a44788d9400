"""What a comparison says of AMD's matrix products, beside real vLLM on a machine that the test makes up."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from vllm import platforms

from llmir.compare import vllm_engine
from llmir.compare.vllm_engine import zentorch_use


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An AMD CPU with AVX512 and zentorch, which vLLM has chosen."""
    made = SimpleNamespace(installed=True, avx512=True, chosen=True, products=True)
    distributions = {"zentorch": SimpleNamespace(version="2.13.0.1")}
    monkeypatch.setattr(
        vllm_engine.metadata,
        "distributions",
        lambda name: [distributions[name]] if made.installed and name in distributions else [],
    )
    platform = SimpleNamespace(is_zen_cpu=lambda: made.chosen)
    monkeypatch.setattr(platforms, "_current_platform", platform)
    monkeypatch.setattr(platforms, "_is_amd_zen_cpu", lambda: made.avx512)
    operations = SimpleNamespace(zentorch_linear_unary=None)
    monkeypatch.setattr(
        vllm_engine,
        "torch",
        SimpleNamespace(ops=SimpleNamespace(zentorch=operations)),
    )
    made.operations = operations
    return made


def test_in_use(machine: SimpleNamespace):
    assert zentorch_use() == "zentorch 2.13.0.1 in use"


def test_without_avx512_or_amd(machine: SimpleNamespace):
    machine.chosen = machine.avx512 = False
    assert zentorch_use() == "zentorch 2.13.0.1 not in use: needs an AMD CPU with AVX512"


def test_not_installed(machine: SimpleNamespace):
    machine.installed = machine.chosen = False
    assert zentorch_use() == "zentorch not installed"


def test_where_it_does_not_load_the_reason_is_given(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    machine.chosen = False
    monkeypatch.setitem(sys.modules, "zentorch", None)  # importing it is an ImportError
    assert zentorch_use().startswith("zentorch 2.13.0.1 not in use: it does not load (import of zentorch halted")


def test_without_the_products_it_is_not_in_use(machine: SimpleNamespace):
    del machine.operations.zentorch_linear_unary
    assert zentorch_use() == "zentorch 2.13.0.1 not in use: it has no products for linear layers"


def test_llmirs_plugin_wraps_the_platform_for_amd_too():
    """vLLM's class for it only changes the products, so the plugin's wrap of the platform in use covers it."""
    from vllm.platforms.zen_cpu import ZenCpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from llmir.frontends.vllm import plugin

    class Zen(ZenCpuPlatform):
        """Wrapped in place of the real one, which stays as it is for other tests."""

    plugin.register()
    plugin._wrap_platform(Zen)
    assert "_llmir_wrapped" in vars(Zen)
    assert plugin.is_llmir(AttentionBackendEnum["LLMIR"])
    assert Zen.get_attn_backend_cls.__func__ is not ZenCpuPlatform.get_attn_backend_cls.__func__
