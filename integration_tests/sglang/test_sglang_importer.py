"""From SGLang's model classes to llm IR."""

from collections import Counter
from typing import Any

import pytest
from sglang.srt.models.llama import LlamaAttention
from tiny_models import LAYERS, WriteModel

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.sglang.importer import configure, import_module
from llmir.frontends.sglang.offline import import_model
from llmir.ir import ops
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import caches_of, decoder_of, model_info, ops_of
from llmir.ir.opaque import import_level, opaque_kinds
from llmir.ir.remarks import remarks
from llmir.ir.text import parse, print_module


def load(folder: str, rank: int = 0, **fields: Any) -> ir.Module:
    return import_module(configure(model_path=folder, skip_tokenizer_init=True, **fields), rank)


def counts(module: ir.Module) -> Counter[str]:
    block = decoder_of(module).entry_block
    return Counter(op.operation.name.removeprefix("llm.") for op in block.operations)


def signatures(module: ir.Module) -> list[AttentionSpec]:
    return [spec_of(op) for op in ops_of(module, PagedAttention)]


def test_each_layer_is_one_op(write_model: WriteModel) -> None:
    found = counts(load(write_model("llama")))
    expected = {
        "embedding": 1,
        "rms_norm": 2 * LAYERS + 1,
        "linear": 4 * LAYERS,
        "rope": LAYERS,
        "append_kv": LAYERS,
        "paged_attention": LAYERS,
        "activation": LAYERS,
        "logits": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {*expected, "slice", "reshape", "func.return"}


@pytest.mark.parametrize("page_size", [1, 24, 128])
def test_attention_carries_its_signature(write_model: WriteModel, page_size: int) -> None:
    module = load(write_model("llama"), page_size=page_size)
    assert signatures(module) == [AttentionSpec.dense(4, 2, 64, "bf16", page_size, scale=64**-0.5)] * LAYERS


def test_the_data_flow_is_the_models_own(write_model: WriteModel) -> None:
    module = load(write_model("llama"))
    embedding, (first, second, *_) = ops_of(module, ops.Embedding)[0], ops_of(module, ops.RMSNorm)
    assert first.x == embedding.result
    assert second.residual == embedding.result
    assert second.x.owner.attributes["weight"].name == "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("fields", "fixed", "allowed"),
    [
        ({}, False, (16, 32, 64, 128, 256, 512)),
        ({"chunked_prefill_size": 96}, False, (16, 32)),
        ({"page_size": 24}, True, (24,)),
    ],
)
def test_the_module_says_what_it_is_of(
    write_model: WriteModel, fields: dict[str, Any], fixed: bool, allowed: tuple[int, ...]
) -> None:
    folder = write_model("llama")
    info = model_info(load(folder, **fields))
    assert info.framework.startswith("sglang ")
    assert (info.model, info.block_size_fixed, info.allowed_block_sizes) == (folder, fixed, allowed)


def test_importing_twice_gives_the_same_text(write_model: WriteModel) -> None:
    server_args = configure(model_path=write_model("llama"), skip_tokenizer_init=True)
    text = print_module(import_module(server_args))
    assert print_module(import_module(server_args)) == text == print_module(parse(text))


def test_cache_type_follows_the_models_dtype(write_model: WriteModel) -> None:
    module = load(write_model("llama"), dtype="float32")
    assert {cache.format.dtype for cache in caches_of(module).values()} == {"f32"}


def test_attention_in_another_type_than_the_models_is_converted(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda self, positions, hidden_states, forward_batch: self.o_proj(
            self.attn(*(x.float() for x in self.forward_prepare_native(positions, hidden_states)), forward_batch).to(
                hidden_states.dtype
            )
        )[0],
    )
    module = load(write_model("llama"))
    assert {s.dtype for s in signatures(module)} == {"bf16"}
    converted = [str(op.result.type) for op in ops_of(module, ops.Elementwise) if op.function.value == "convert"]
    assert sum("xbf16" in kind for kind in converted) == 4 * LAYERS, "query, key, value, and what the model casts back"
    assert sum("xf32" in kind for kind in converted) == 4 * LAYERS, "the model's own casts, and the result"


def test_a_rank_has_its_share(write_model: WriteModel) -> None:
    module = load(write_model("llama"), rank=1, tp_size=2)
    assert {(s.num_heads, s.num_kv_heads) for s in signatures(module)} == {(2, 1)}
    weight = ops_of(module, ops.Linear)[0].weight
    assert (weight.type.dim, weight.type.shards, weight.type.index) == (0, 2, 1)
    assert counts(module)["all_reduce"] == 2 * LAYERS + 1


def test_heads_are_padded_as_sglang_pads_them_for_its_cpu_ranks(smollm2: str) -> None:
    assert {(s.num_heads, s.num_kv_heads) for s in signatures(load(smollm2, tp_size=2))} == {(6, 2)}


def test_qwen2_has_biases(write_model: WriteModel) -> None:
    module = load(write_model("qwen2"))  # kept: an op does not keep its module alive
    biased = [op.weight.name for op in ops_of(module, ops.Linear) if op.bias is not None]
    assert biased == [f"model.layers.{i}.self_attn.qkv_proj.weight" for i in range(LAYERS)]


def test_qwen3_normalizes_queries_and_keys_by_head(write_model: WriteModel) -> None:
    module = load(write_model("qwen3"))
    assert counts(module)["rms_norm"] == 4 * LAYERS + 1
    assert {s.head_size for s in signatures(module)} == {128}


def test_sglangs_mistral_has_no_window(write_model: WriteModel) -> None:
    assert [s.mask.window for s in signatures(load(write_model("mistral")))] == [0] * LAYERS


def test_olmo3_attends_to_windows_by_turns(write_model: WriteModel) -> None:
    assert [s.mask.window for s in signatures(load(write_model("olmo3")))] == [128, 0]


def test_gemma2_caps_scores_and_alternates_windows(write_model: WriteModel) -> None:
    module = load(write_model("gemma2"))
    assert [(s.mask.window, s.soft_cap) for s in signatures(module)] == [(128, 50.0), (0, 50.0)]
    assert ops_of(module, ops.Logits)[0].soft_cap.value == 30.0
    assert ops_of(module, ops.RMSNorm)[0].weight_offset.value == 1.0


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_other_models_of_known_layers_come_free(write_model: WriteModel, family: str) -> None:
    assert counts(load(write_model(family)))["paged_attention"] == LAYERS


def test_the_real_model(smollm2: str) -> None:
    module = load(smollm2)
    assert {(s.num_heads, s.num_kv_heads, s.head_size) for s in signatures(module)} == {(9, 3, 64)}
    assert len(caches_of(module)) == 30


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("opt", {"OPTLearnedPositionalEmbedding": 1}),
        ("cohere", {"LayerNorm": LAYERS + 1}),
    ],
)
def test_layers_that_llmir_does_not_know_are_opaque(
    write_model: WriteModel, family: str, kinds: dict[str, int]
) -> None:
    module = load(write_model(family))
    found = {kind.rpartition(".")[2]: count for kind, count in opaque_kinds(module).items()}
    assert {kind: found[kind] for kind in kinds} == kinds
    assert counts(module)["paged_attention"] == LAYERS
    [remark] = [remark for remark in remarks(module) if remark.pass_name == "import"]
    assert (remark.decision, remark.numbers["opaque"]) == ("open", opaque_kinds(module))


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_vl"])
def test_other_kinds_of_model_are_imported(write_model: WriteModel, family: str) -> None:
    module = load(write_model(family))
    assert counts(module)["paged_attention"] == LAYERS
    assert import_level(module) in ("full", "open")


def test_a_model_that_cannot_be_watched_has_its_attention_layers(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(write_model("llama"))

    def forward(self: LlamaAttention, positions: Any, hidden_states: Any, forward_batch: Any) -> Any:
        return hidden_states if positions.max() > 0 else self.o_proj(hidden_states)[0]

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    module = load(write_model("llama"))
    assert import_level(module) == "attention"
    assert (signatures(module), caches_of(module).keys()) == (signatures(whole), caches_of(whole).keys())


def test_attention_without_a_kernel_is_refused_by_name(write_model: WriteModel) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"head size is 42.* \(and so has 1 more layer\)") as refusal:
        load(write_model("llama", head_dim=42))
    assert refusal.value.layer == "model.layers.0.self_attn.attn"


def test_eight_bit_weights_do_not_make_the_cache_one_of_eight_bits(write_model: WriteModel) -> None:
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    module = load(write_model("llama", quantization_config=scheme))
    assert [cache.format.dtype for cache in caches_of(module).values()] == ["bf16"] * LAYERS


def test_a_decoder_with_a_tower_is_refused_where_images_are_attended_to_both_ways(write_model: WriteModel) -> None:
    folder = write_model("gemma3")
    assert counts(load(folder))["paged_attention"] == LAYERS, "SGLang takes text alone unless asked for more"
    with pytest.raises(LlmirError, match="both directions over the tokens of an image"):
        load(folder, enable_multimodal=True)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("deepseek_v2", {}, "multi-head latent attention"),
        ("bloom", {}, "SGLang cannot build BloomForCausalLM"),
        ("gpt_oss", {}, "SGLang cannot configure model .*GptOssForCausalLM requires"),
        ("llama", {"model_type": "nothing"}, "SGLang cannot configure model .*nothing"),
        ("llama", {"torch_dtype": "float64"}, "float64"),
    ],
)
def test_compiling_a_model_offline_refuses_it_by_what_it_has(
    write_model: WriteModel, family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LlmirError, match=reason):
        import_model(write_model(family, **changes))
