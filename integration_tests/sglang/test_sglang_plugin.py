"""The plugin inside SGLang: what it adds, that it changes nothing unless asked, and how it fails."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from processes import run
from sglang.srt.arg_groups import choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.platforms import current_platform
from tiny_models import WriteModel

from llmir.frontends.sglang import plugin

CONFIGURE = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
server_args = ServerArgs(
    model_path=sys.argv[1], device="cpu", skip_tokenizer_init=True, attention_backend="torch_native", random_seed=1
)
server_args.resolve_once()
view = resolving_view(server_args)
for name in sorted(vars(server_args)) + [field for field in server_args.__struct_fields__]:
    if not name.startswith("_"):
        print(name, getattr(view, name))
"""
FORBIDDEN = ("torch", "torch_mlir", "mlir", "matplotlib", "numpy", "sglang", "typer", "rich")


def test_without_the_flag_the_configuration_is_sglangs_own(write_model: WriteModel) -> None:
    folder = write_model("llama")
    with_plugin = run(CONFIGURE, folder)
    assert "torch_native" in with_plugin
    assert with_plugin == run(CONFIGURE, folder, SGLANG_PLUGINS="other")
    assert "llmir" not in with_plugin.replace(folder, "")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch):
    """``serving("torch_native")``: as in a process whose server arguments name this attention backend."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import overrides

    def serve(backend: str) -> None:
        arguments = SimpleNamespace(
            attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None
        )
        monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
        monkeypatch.setattr(overrides, "resolving_view", lambda server_args: server_args)

    return serve


def test_other_backends_get_sglangs_own_pool(serving) -> None:
    serving("torch_native")
    assert current_platform.get_kv_pool_cls(kind="mha") is None
    assert ATTENTION_BACKENDS["torch_native"].__module__.startswith("sglang.")


def test_llmirs_backend_gets_llmirs_pool_of_the_kind_it_has(serving) -> None:
    serving("llmir")
    assert current_platform.get_kv_pool_cls(kind="mha").__name__ == "LlmirKVPool"
    assert current_platform.get_kv_pool_cls(kind="mla") is None


def test_registering_again_changes_nothing() -> None:
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS

    before = list(choices.ATTENTION_BACKEND_CHOICES), {name: list(hooks) for name, hooks in _HOOKS.items()}
    plugin.register()
    assert before == (choices.ATTENTION_BACKEND_CHOICES, _HOOKS)


def test_importing_the_plugin_is_light() -> None:
    loaded = f"sorted({set(FORBIDDEN)!r} & {{name.split('.')[0] for name in sys.modules}})"
    assert run(f"import sys, llmir.frontends.sglang.plugin; print({loaded})").strip() == "[]"


class TestWhereSGLangIsAnother:
    """SGLang without an interface that llmir needs."""

    @pytest.fixture(autouse=True)
    def another_sglang(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.resolution_hooks", None)
        monkeypatch.setitem(ATTENTION_BACKENDS, "llmir", ATTENTION_BACKENDS["llmir"])
        yield

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--attention-backend", "llmir"],
            ["--attention-backend=llmir"],
            ["--model-path", "m", "--decode-attention-backend", "llmir"],
        ],
    )
    def test_a_command_that_asks_for_llmir_ends(self, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["launch_server.py", *arguments])
        with pytest.raises(SystemExit, match=r"could not register with this SGLang .*resolution_hooks.*llmir check"):
            plugin.register()

    @pytest.mark.parametrize("arguments", [[], ["--attention-backend", "torch_native"], ["--model-path", "llmir"]])
    def test_others_go_on_and_llmir_says_why_it_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, arguments: list[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["launch_server.py", *arguments])
        plugin.register()
        assert "could not register" in caplog.text
        with pytest.raises(plugin.RegistrationError, match="resolution_hooks"):
            ATTENTION_BACKENDS["llmir"](None)
