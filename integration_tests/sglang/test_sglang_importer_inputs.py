"""Configurations that are easily misread: windows that no layer has, odd head sizes, tied embeddings, uneven ranks."""

from itertools import product
from typing import Any

import pytest
from tiny_models import LAYERS, WriteModel

from llmir.frontends.sglang.importer import configure, import_module
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import ops_of
from llmir.ir.ops import AllReduce, Embedding, Linear, Logits
from llmir.ir.weight import weights_of

FULL, SLIDING = "full_attention", "sliding_attention"


def load(folder: str, rank: int = 0, **fields: Any) -> ir.Module:
    return import_module(configure(model_path=folder, skip_tokenizer_init=True, **fields), rank)


def specs(module: ir.Module) -> list[AttentionSpec]:
    return [spec_of(op) for op in ops_of(module, PagedAttention)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": False}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": LAYERS, "layer_types": [FULL] * LAYERS}),
        ("qwen3", {"use_sliding_window": False, "layer_types": [FULL] * LAYERS}),
        ("gemma3_text", {"layer_types": [FULL] * LAYERS}),
        ("olmo3", {"layer_types": [FULL] * LAYERS}),
    ],
)
def test_a_window_that_no_layer_has_is_no_window(write_model: WriteModel, family: str, changes: dict[str, Any]) -> None:
    module = load(write_model(family, sliding_window=128, **changes))
    assert [spec.mask.window for spec in specs(module)] == [0] * LAYERS


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("kinds", [[FULL, SLIDING], [SLIDING, FULL], [SLIDING, SLIDING]])
def test_each_layer_has_its_own_window(write_model: WriteModel, family: str, kinds: list[str]) -> None:
    module = load(write_model(family, sliding_window=128, layer_types=kinds))
    assert [spec.mask.window for spec in specs(module)] == [{FULL: 0, SLIDING: 128}[kind] for kind in kinds]


@pytest.mark.parametrize("kinds", [[SLIDING, FULL], [FULL, SLIDING], [FULL, FULL]])
def test_what_sglang_makes_of_a_configuration_is_what_is_read(write_model: WriteModel, kinds: list[str]) -> None:
    """Its Gemma 2 alternates, the first layer with a window, whatever the layers are said to be."""
    module = load(write_model("gemma2", sliding_window=128, layer_types=kinds))
    assert [spec.mask.window for spec in specs(module)] == [128, 0]


@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_heads_may_be_of_another_size_than_hidden_over_heads(
    write_model: WriteModel, family: str, head_size: int
) -> None:
    module = load(write_model(family, head_dim=head_size, hidden_size=384))
    assert {(s.num_heads, s.num_kv_heads, s.head_size) for s in specs(module)} == {(4, 2, head_size)}
    qkv, out = (op.weight.shape for op in ops_of(module, Linear)[:2])
    assert (qkv, out) == ([8 * head_size, 384], [384, 4 * head_size])


@pytest.mark.parametrize(("family", "tied"), product(["llama", "qwen2"], [True, False]))
@pytest.mark.parametrize("ranks", [1, 2])
def test_tied_embeddings_are_one_weight(write_model: WriteModel, family: str, tied: bool, ranks: int) -> None:
    module = load(write_model(family, tie_word_embeddings=tied), tp_size=ranks)
    [embedding], [head] = ops_of(module, Embedding), ops_of(module, Logits)
    assert (embedding.weight.name == head.weight.name) is tied
    vocabulary = [weight for weight in weights_of(module).values() if weight.shape == [512 // ranks, 256]]
    assert len([weight for weight in vocabulary if "layers" not in weight.name]) == (1 if tied else 2)


@pytest.mark.parametrize(("ranks", "rank"), [(3, 0), (3, 2), (4, 0), (4, 3)])
def test_heads_that_ranks_do_not_divide_are_padded_as_sglang_pads_them(
    write_model: WriteModel, ranks: int, rank: int
) -> None:
    """On a CPU it adds KV heads until ranks divide them, and the query heads that go with them: 2 for each."""
    module = load(write_model("llama"), rank=rank, tp_size=ranks)
    assert {(s.num_heads, s.num_kv_heads) for s in specs(module)} == {(2, 1)}
    qkv, out = (op.weight for op in ops_of(module, Linear)[:2])
    assert (qkv.shape, out.shape) == ([4 * 64, 256], [256, 2 * 64])
    assert (qkv.type.shards, qkv.type.index) == (ranks, rank)
    assert len(ops_of(module, AllReduce)) == 2 * LAYERS + 1
