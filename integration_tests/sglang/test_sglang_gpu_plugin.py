"""The plugin where SGLang serves on a GPU: which backend, and what of SGLang it changes."""

import subprocess
import sys
from types import SimpleNamespace

import gpu_fakes
import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.platforms import cuda, rocm

from llmir.frontends.sglang import gpu_backend, hooks, plugin


def test_a_runner_on_a_gpu_gets_the_backend_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "GpuAttentionRunner", gpu_fakes.Recorded)
    made = ATTENTION_BACKENDS["llmir"](gpu_fakes.runner(gpu_fakes.plan(), monkeypatch))
    assert type(made) is gpu_backend.LlmirGpuBackend


@pytest.mark.parametrize("platform", [cuda.CudaSRTPlatform, rocm.RocmSRTPlatform])
def test_cuda_and_rocm_ask_for_llmirs_pool(monkeypatch: pytest.MonkeyPatch, platform: type) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import overrides

    arguments = SimpleNamespace(
        attention_backend="llmir", prefill_attention_backend=None, decode_attention_backend=None
    )
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
    monkeypatch.setattr(overrides, "resolving_view", lambda server_args: server_args)
    assert platform().device_type == "cuda"
    assert platform().get_kv_pool_cls(kind="mha").__name__ == "LlmirKVPool"


@pytest.mark.parametrize("name", [name for name in vars(AttentionBackend) if "cuda_graph" in name])
def test_the_graph_hooks_are_those_of_this_sglang(name: str) -> None:
    """A hook that SGLang adds is looked at before llmir is said to serve with it."""
    assert name in {
        "init_cuda_graph_state",
        "get_cuda_graph_seq_len_fill_value",
        "on_after_cuda_graph_warmup",
        # Of backends whose metadata graphs have addresses of, which llmir's breakable graphs have not.
        "init_forward_metadata_for_breakable_cuda_graph_capture",
        "prepare_forward_metadata_for_breakable_cuda_graph_replay",
        "use_captured_forward_metadata_for_breakable_cuda_graph",
        # Of prefill graphs that hold attention, which llmir refuses, or that another feature needs.
        "supports_full_cuda_graph_chunked_prefix",
        "prepare_full_cuda_graph_chunked_prefix",
        "prefill_cuda_graph_max_batch_size",
        "supports_prefill_cuda_graph_max_context_size",
        "prefill_cuda_graph_default_max_seq_len",
        "validate_elastic_cuda_graph_recapture",
    }


def test_a_replayed_batch_carries_its_requests_ids() -> None:
    hooks.name_replayed_requests()
    buffers = SimpleNamespace(
        **dict.fromkeys(("input_ids", "positions", "req_pool_indices", "seq_lens", "seq_lens_cpu"), torch.zeros(4)),
        mamba_track_indices=None,
        encoder_lens=None,
    )

    class Batch(SimpleNamespace):
        def __getattr__(self, name: str) -> None:
            return None

    batch = Batch(rids=["a", "b"])
    view = decode_cuda_graph_runner.build_replay_fb_view(
        forward_batch=batch,
        buffers=buffers,
        bs=4,
        raw_bs=2,
        num_tokens=4,
        global_num_tokens_cpu=None,
        seq_len_fill_value=1,
        capture_forward_mode=None,
        is_encoder_decoder=False,
    )
    assert view.rids == ["a", "b"]


def test_asking_twice_changes_sglang_once() -> None:
    hooks.name_replayed_requests()
    before = decode_cuda_graph_runner.build_replay_fb_view
    hooks.name_replayed_requests()
    assert decode_cuda_graph_runner.build_replay_fb_view is before


def test_nothing_of_sglang_is_changed_where_llmir_does_not_serve() -> None:
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import build_replay_fb_view
from sglang.srt.models.utils import enable_fused_set_kv_buffer
print(hasattr(build_replay_fb_view, "__wrapped__"), hasattr(enable_fused_set_kv_buffer, "__wrapped__"))
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_backend_for_gpus_is_found_by_name_alone() -> None:
    assert ATTENTION_BACKENDS["llmir"] is plugin._backend
