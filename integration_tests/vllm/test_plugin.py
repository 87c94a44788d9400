"""The plugin inside vLLM: what it adds, and that it changes nothing unless asked."""

import pickle
from types import SimpleNamespace

import pytest
from processes import run
from tiny_models import WriteModel
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from llmir.errors import LlmirError
from llmir.frontends.vllm import plugin

CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
print(EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config())
"""
FORBIDDEN = ("torch", "torch_mlir", "mlir", "matplotlib", "numpy", "vllm", "typer", "rich")


def test_without_the_flag_the_configuration_is_vllms_own(write_model: WriteModel) -> None:
    folder = write_model("llama")
    with_plugin = run(CONFIGURE, folder)
    assert with_plugin == run(CONFIGURE, folder, VLLM_PLUGINS="")
    assert "llmir" not in with_plugin


@pytest.mark.parametrize("backend", [None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN])
def test_other_backends_are_chosen_as_before(backend: AttentionBackendEnum | None) -> None:
    plugin.register()
    selection = SimpleNamespace(use_sparse=False, use_mla=False)
    chosen = current_platform.get_attn_backend_cls(backend, attn_selector_config=selection, num_heads=4)
    assert chosen == AttentionBackendEnum.CPU_ATTN.get_path()


def test_registering_again_changes_nothing() -> None:
    plugin.register()
    wrapped = type(current_platform).check_and_update_config
    plugin.register()
    assert type(current_platform).check_and_update_config == wrapped


def test_importing_the_plugin_is_light() -> None:
    loaded = f"sorted({set(FORBIDDEN)!r} & {{name.split('.')[0] for name in sys.modules}})"
    assert run(f"import sys, llmir.frontends.vllm.plugin; print({loaded})").strip() == "[]"


def test_the_backend_is_known_to_a_process_that_has_not_loaded_plugins() -> None:
    plugin.register()
    data = pickle.dumps(AttentionBackendEnum["LLMIR"])
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).get_path())"
    assert run(code, data.hex()).strip().endswith(plugin.BACKEND_PATHS["cpu"])


def test_somebody_elses_custom_backend_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, "somebody.Backend")
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_path() == "somebody.Backend"
    assert not plugin.is_llmir(AttentionBackendEnum.CUSTOM)


@pytest.mark.parametrize(
    ("family", "engine_args", "reason"),
    [
        ("llama", {"block_size": 48}, "block size 48 is not a multiple of 32"),
        ("llama", {"kv_cache_dtype": "fp8"}, "KV cache dtype is 'fp8'"),
        ("llama", {"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}}, "by kind of layer"),
        ("llama", {"additional_config": {"llmir": {"blocksize": "64"}}}, "no option 'blocksize'"),
        ("deepseek_v2", {"trust_remote_code": False}, "multi-head latent attention"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_configuration(
    write_model: WriteModel, family: str, engine_args: dict, reason: str
) -> None:
    plugin.register()
    arguments = EngineArgs(
        model=write_model(family), skip_tokenizer_init=True, attention_backend="LLMIR", **engine_args
    )
    with pytest.raises(LlmirError, match=reason):
        arguments.create_engine_config()
