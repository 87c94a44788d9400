"""What the benchmark gives to peers that need a GPU: checked against float64 stand-ins of their functions."""

import types

import pytest
import torch
from on_gpu import flash_attention_peer, flashinfer_peer
from on_gpu.batches import Batch, Shape
from on_gpu.peer import Sources, Unserved, source_version
from on_gpu.peers import Peers
from small_steps import DECODE, FLASHINFER, MIXED, ONE, TREE, flash_attention, merge, step_of

ROUNDING = 1e-6


def error_of(side, step):
    """The side's relative error in the first layer."""
    side.prepare()
    side.run(0)
    return step.errors(side.output)[0]


@pytest.mark.parametrize("batch", [DECODE, MIXED, TREE], ids=lambda batch: batch.name)
@pytest.mark.parametrize("page_size", [16, 8])
def test_flash_attention_gets_the_whole_step(batch, page_size):
    step = step_of(batch)
    assert error_of(flash_attention_peer.FlashAttention(flash_attention(), 3, step, page_size), step) < ROUNDING


@pytest.mark.parametrize("batch", [ONE, TREE], ids=lambda batch: batch.name)
def test_flash_attentions_cascade_reads_the_common_prefix_once(batch):
    step, merging = step_of(batch), types.SimpleNamespace(merge_attn_states=merge)
    assert error_of(flash_attention_peer.Cascade(flash_attention(), merging, 3, step, 16), step) < ROUNDING


@pytest.mark.parametrize("batch", [DECODE, MIXED, ONE, TREE], ids=lambda batch: batch.name)
def test_flashinfer_gets_the_whole_step(batch):
    step = step_of(batch)
    sides = flashinfer_peer.sides_of(FLASHINFER, step, torch.empty(0))
    assert [error_of(side, step) < ROUNDING for side in sides] == [True] * len(sides)


def test_flashinfer_serves_shared_prefixes_by_its_cascade_too():
    sides = flashinfer_peer.sides_of(FLASHINFER, step_of(TREE), torch.empty(0))
    assert [side.name for side in sides] == ["FlashInfer decode", "FlashInfer cascade"]


def test_a_head_size_that_flashinfer_has_no_kernels_for_is_left_to_the_others():
    step = step_of(Batch("decode", Shape("phi", 4, 4, 96), (1,), (5,)))
    with pytest.raises(Unserved, match="96"):
        flashinfer_peer.sides_of(FLASHINFER, step, torch.empty(0))


def test_peers_that_are_not_here_are_named_with_the_reason():
    assert Peers.find(Sources(), torch.device("cpu")).absent == {
        "FlashAttention": "it is compiled for CUDA alone",
        "FlashInfer": "it is compiled for CUDA alone",
        "vLLM unified_attention": "vLLM is not installed and no --vllm-source was given",
        "SGLang Triton": "SGLang is not installed and no --sglang-source was given",
    }


def test_a_packed_library_is_unpacked(tmp_path):
    import lzma

    packed = tmp_path / "_vllm_fa3_C.abi3.so.xz"
    packed.write_bytes(lzma.compress(b"library"))
    found = flash_attention_peer.unpacked(packed)
    assert (found.name, found.read_bytes()) == ("_vllm_fa3_C.abi3.so", b"library")


def test_a_sources_version_is_read_without_importing_it(tmp_path):
    (tmp_path / "_version.py").write_text("__version__: str\n\n__version__ = version = '0.26.0'\n")
    assert source_version(tmp_path) == "0.26.0"
