"""llmir's KV pool in the place of SGLang's: the same rows by slot, whatever the pages look like inside."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from llmir.errors import LlmirError
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang import pool as pools
from llmir.frontends.sglang.pool import LlmirKVPool
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec
from llmir.targets.x86.isa import INSTRUCTION_SETS

HEADS, HEAD_SIZE, SLOTS, FIRST_LAYER = 3, 64, 256, 4
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: Where a cache of this page size and type lies how, on which instruction set.
CASES = [
    (1, "row", "avx512_bf16", "bf16"),
    (24, "row", "avx512", "f16"),
    *((size, "pair", "avx512_bf16", "bf16") for size in (16, 32, 64, 128)),
    *((size, "lane", "avx512", "f32") for size in (16, 32, 64, 128)),
    (16, "pair", "avx2", "bf16"),
    (128, "row", "avx2", "f16"),
]


@pytest.fixture
def make_pools(monkeypatch: pytest.MonkeyPatch):
    """``make_pools(page_size, layout, isa, element_type)``: llmir's pool and SGLang's, with two layers each."""

    def make(
        page_size: int, layout: str, isa: str, element_type: str, **changes: object
    ) -> tuple[LlmirKVPool, MHATokenToKVPool]:
        attention = AttentionSpec.dense(9, HEADS, HEAD_SIZE, element_type, page_size, 0.125, layout=layout)
        kernel = SimpleNamespace(spec=KernelSpec(attention, isa, ()))
        plan = SimpleNamespace(block_size=page_size, kernels=(kernel,))
        monkeypatch.setattr(pools, "get_server_args", lambda: None)
        monkeypatch.setattr(pools, "plan_of", lambda server_args: plan)
        arguments = {
            "size": SLOTS // page_size * page_size,
            "page_size": page_size,
            "dtype": DTYPES[element_type],
            "head_num": HEADS,
            "head_dim": HEAD_SIZE,
            "layer_num": 2,
            "device": "cpu",
            "enable_memory_saver": False,
            "start_layer": FIRST_LAYER,
            "end_layer": FIRST_LAYER + 1,
            **changes,
        }
        return LlmirKVPool(**arguments), MHATokenToKVPool(**arguments)

    return make


def random_rows(slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(len(slots), HEADS, HEAD_SIZE).to(dtype) for _ in range(2))


def some_slots(pool: MHATokenToKVPool, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(pool.size, generator=generator)[:count] + pool.page_size


def fill(*filled: MHATokenToKVPool, layer: int = FIRST_LAYER, count: int = 100, seed: int = 0) -> torch.Tensor:
    """The same random rows into the same slots of each pool."""
    slots = some_slots(filled[0], count, seed)
    keys, values = random_rows(slots, filled[0].dtype)
    for pool in filled:
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(slots, None), keys, values)
    return slots


def assert_same(ours: LlmirKVPool, theirs: MHATokenToKVPool) -> None:
    for layer in (FIRST_LAYER, FIRST_LAYER + 1):
        assert torch.equal(ours.get_key_buffer(layer), theirs.get_key_buffer(layer))
        assert torch.equal(ours.get_value_buffer(layer), theirs.get_value_buffer(layer))
        for mine, its in zip(ours.get_kv_buffer(layer), theirs.get_kv_buffer(layer), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_read_as_they_were_written(make_pools, case) -> None:
    ours, theirs = make_pools(*case)
    fill(ours, theirs, layer=FIRST_LAYER, seed=1)
    fill(ours, theirs, layer=FIRST_LAYER + 1, seed=2)
    fill(ours, theirs, layer=FIRST_LAYER, seed=3)  # over what is there
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_move(make_pools, case) -> None:
    ours, theirs = make_pools(*case)
    slots = fill(ours, theirs)
    targets = some_slots(ours, 40, seed=9)  # sources are among them
    ours.move_kv_cache(targets, slots[:40])
    theirs.use_native_move_kv_cache = True  # its other ways are Triton's and sgl_kernel's
    theirs.move_kv_cache(targets, slots[:40])
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_copy_comes_back_into_other_slots(make_pools, case) -> None:
    ours, _ = make_pools(*case)
    fill(ours, layer=FIRST_LAYER)
    slots = fill(ours, layer=FIRST_LAYER + 1)
    before = [buffer[slots] for layer in (FIRST_LAYER, FIRST_LAYER + 1) for buffer in ours.get_kv_buffer(layer)]
    copy = ours.get_cpu_copy(slots)
    for pages in ours.pages:
        pages.zero_()
    elsewhere = some_slots(ours, len(slots), seed=5)
    ours.load_cpu_copy(copy, elsewhere)
    after = [buffer[elsewhere] for layer in (FIRST_LAYER, FIRST_LAYER + 1) for buffer in ours.get_kv_buffer(layer)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_takes_as_many_bytes_as_sglangs(make_pools, case) -> None:
    ours, theirs = make_pools(*case)
    assert ours.get_kv_size_bytes() == theirs.get_kv_size_bytes()


def test_other_types_are_converted_as_sglang_converts_them(make_pools) -> None:
    ours, theirs = make_pools(16, "pair", "avx512_bf16", "bf16")
    slots = some_slots(ours, 10)
    keys, values = random_rows(slots, torch.float32)
    for pool in (ours, theirs):
        pool.set_kv_buffer(SimpleNamespace(layer_id=FIRST_LAYER), KVWriteLoc(slots, None), keys, values)
    assert_same(ours, theirs)


def test_sglangs_own_layouts_stay_out(make_pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    ours, _ = make_pools(16, "pair", "avx512_bf16", "bf16")
    slots = fill(ours)
    assert len(ours.get_key_buffer(FIRST_LAYER)[slots]) == len(slots)


@pytest.mark.parametrize("changes", [{"head_num": 2}, {"head_dim": 128}, {"v_head_dim": 32}])
def test_a_pool_of_another_shape_than_the_plans_is_refused(make_pools, changes) -> None:
    with pytest.raises(LlmirError, match="the plan was made for"):
        make_pools(16, "pair", "avx512_bf16", "bf16", **changes)


@pytest.mark.parametrize("name", ["k_buffer", "v_buffer", "k_data_ptrs", "v_data_ptrs", "data_ptrs", "data_strides"])
def test_nobody_reads_the_pages_as_rows_of_tokens(make_pools, name: str) -> None:
    ours, _ = make_pools(16, "pair", "avx512_bf16", "bf16")
    with pytest.raises(UnsupportedFeatureError, match=f"has no {name}: its rows are pages"):
        getattr(ours, name)


def test_the_bytes_of_a_pool_are_counted(make_pools) -> None:
    ours, theirs = make_pools(16, "pair", "avx512_bf16", "bf16")
    assert ours.get_kv_size_bytes() == theirs.get_kv_size_bytes()
    ours._clear_buffers()
    assert not hasattr(ours, "pages")


@pytest.mark.parametrize("method", ["get_contiguous_buf_infos", "get_device_pool_infos"])
def test_nobody_reads_the_pages_as_sglangs(make_pools, method: str) -> None:
    ours, _ = make_pools(16, "pair", "avx512_bf16", "bf16")
    with pytest.raises(UnsupportedFeatureError, match="SGLang's layout"):
        getattr(ours, method)()


def test_the_layouts_of_every_instruction_set_are_tried() -> None:
    assert {isa for _, _, isa, _ in CASES} == set(INSTRUCTION_SETS)
