"""llmir's KV pool in the layout of GPUs, on CPU tensors: what SGLang and its models may ask of it there."""

from types import SimpleNamespace

import gpu_fakes
import pytest
import torch
from gpu_fakes import HEAD_SIZE, KV_HEADS, PAGE, SLOTS
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.models import utils

from llmir.frontends.common.support import UnsupportedFeatureError

LAYER = 1


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):
    return gpu_fakes.pool(gpu_fakes.plan(), monkeypatch)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch):
    return gpu_fakes.pool(gpu_fakes.plan(quantized=True), monkeypatch)


def fill(pool, slots: torch.Tensor, dtype: torch.dtype = torch.bfloat16, **scales: float):
    keys, values = (torch.randn(len(slots), KV_HEADS, HEAD_SIZE).to(dtype) for _ in range(2))
    pool.set_kv_buffer(SimpleNamespace(layer_id=LAYER), KVWriteLoc(slots, None), keys.clone(), values.clone(), **scales)
    return keys, values


def test_a_page_is_keys_then_values_of_one_head(pool) -> None:
    slots = torch.arange(2 * PAGE, 3 * PAGE)
    keys, values = fill(pool, slots)
    page = pool.pages[LAYER][2].view(KV_HEADS, 2, PAGE, HEAD_SIZE)
    assert torch.equal(page[:, 0], keys.transpose(0, 1))
    assert torch.equal(page[:, 1], values.transpose(0, 1))


def test_pages_are_contiguous_and_one_is_spare(pool) -> None:
    assert [pages.shape for pages in pool.pages] == [(SLOTS // PAGE + 1, KV_HEADS, 2, PAGE * HEAD_SIZE)] * 2
    assert all(pages.is_contiguous() for pages in pool.pages)


def test_what_is_shown_is_a_view_with_a_shape_that_is_no_buffer_of_sglangs(pool) -> None:
    slots = torch.tensor([5, 40, 41, 200])
    keys, values = fill(pool, slots)
    for shown, expected in zip(pool.get_kv_buffer(LAYER), (keys, values), strict=True):
        assert shown.shape == (SLOTS // PAGE + 1, PAGE, KV_HEADS, HEAD_SIZE)
        assert torch.equal(shown[slots // PAGE, slots % PAGE], expected)
        assert shown.untyped_storage().data_ptr() == pool.pages[LAYER].data_ptr()


def test_rows_move(pool) -> None:
    slots, targets = torch.arange(16, 56), torch.arange(30, 70)
    keys, _ = fill(pool, slots)
    pool.move_kv_cache(targets, slots)
    assert torch.equal(pool.get_key_buffer(LAYER)[targets // PAGE, targets % PAGE], keys)


def test_a_copy_in_host_memory_comes_back(pool) -> None:
    slots = torch.arange(16, 56)
    keys, values = fill(pool, slots)
    copy = pool.get_cpu_copy(slots)
    pool.pages[LAYER].zero_()
    pool.load_cpu_copy(copy, slots + 100)
    for shown, expected in zip(pool.get_kv_buffer(LAYER), (keys, values), strict=True):
        assert torch.equal(shown[(slots + 100) // PAGE, (slots + 100) % PAGE], expected)


def test_a_quantized_cache_takes_half_the_bytes(pool, quantized) -> None:
    assert sum(quantized.get_kv_size_bytes()) * 2 == sum(pool.get_kv_size_bytes())
    assert (pool.is_fp8, quantized.is_fp8) == (False, True)


def test_a_quantized_cache_keeps_quotients(quantized) -> None:
    slots = torch.arange(16, 56)
    keys, _ = fill(quantized, slots, k_scale=0.5, v_scale=2.0)
    shown = quantized.get_key_buffer(LAYER)[slots // PAGE, slots % PAGE]
    assert shown.dtype == torch.float8_e4m3fn
    assert torch.equal(shown.float(), (keys / 0.5).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("method", ["get_contiguous_buf_infos", "get_device_pool_infos"])
def test_nobody_reads_the_pages_as_sglangs(pool, method: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="SGLang's layout"):
        getattr(pool, method)()


def test_a_size_that_is_known_only_after_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedFeatureError, match="SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        gpu_fakes.pool(gpu_fakes.plan(), monkeypatch, post_capture_active=True)


class TestModelsThatWriteTheCache:
    """On GPUs some of SGLang's models write keys and values themselves, where they are let."""

    @pytest.fixture
    def on_cuda(self, pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(utils, "_is_cuda", True)
        monkeypatch.setattr(utils, "get_token_to_kv_pool", lambda: pool)
        monkeypatch.setattr(utils, "is_cp_active", lambda batch: False)

    @pytest.mark.usefixtures("on_cuda")
    def test_they_leave_it_to_llmir(self) -> None:
        from sglang.srt.models import gpt_oss, qwen3_moe

        from llmir.frontends.sglang import hooks

        hooks.keep_models_from_the_cache()
        for module in (utils, qwen3_moe, gpt_oss):
            assert module.enable_fused_set_kv_buffer(SimpleNamespace()) is False

    @pytest.mark.usefixtures("on_cuda")
    def test_one_that_does_not_ask_is_refused(self) -> None:
        from llmir.frontends.sglang import hooks

        hooks.keep_models_from_the_cache()
        with pytest.raises(UnsupportedFeatureError, match="writes the KV cache of layer 3 itself"):
            utils.create_fused_set_kv_buffer_arg(torch.zeros(1), SimpleNamespace(layer_id=3), SimpleNamespace())
