"""From vLLM's model classes to llm IR."""

import multiprocessing
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WriteModel
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.vllm.importer import import_module
from llmir.frontends.vllm.offline import configure
from llmir.ir import ops
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.attributes import to_python
from llmir.ir.bindings import ir
from llmir.ir.module import caches_of, decoder_of, model_info, ops_of
from llmir.ir.opaque import Opaque, import_level, opaque_kinds
from llmir.ir.remarks import remarks
from llmir.ir.text import parse, print_module


def load(folder: str, rank: int = 0, **engine_args: Any) -> ir.Module:
    return import_module(configure(folder, skip_tokenizer_init=True, max_model_len=256, **engine_args), rank)


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


def test_attention_carries_its_signature(write_model: WriteModel) -> None:
    module = load(write_model("llama"))
    assert signatures(module) == [AttentionSpec.dense(4, 2, 64, "bf16", 128, scale=64**-0.5)] * LAYERS


def test_the_data_flow_is_the_models_own(write_model: WriteModel) -> None:
    module = load(write_model("llama"))
    embedding, (first, second, *_) = ops_of(module, ops.Embedding)[0], ops_of(module, ops.RMSNorm)
    assert first.x == embedding.result
    assert second.residual == embedding.result
    assert second.x.owner.attributes["weight"].name == "model.layers.0.self_attn.o_proj.weight"


def test_the_module_says_what_it_is_of(write_model: WriteModel) -> None:
    folder = write_model("llama")
    info = model_info(load(folder, block_size=96))
    assert info.framework.startswith("vllm ")
    assert (info.model, info.block_size_fixed) == (folder, True)
    assert info.allowed_block_sizes == (32, 64, 96, 128, 256), "up to the longest sequence, and the user's own"


def test_attention_in_another_type_than_the_models_is_refused(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: LlamaAttention, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return self.o_proj(self.attn(q.float(), k.float(), v.float()).to(qkv.dtype))[0]

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedLayerError, match="its query is in f32, and a kernel for its KV cache reads bf16"):
        load(write_model("llama"))


def test_importing_twice_gives_the_same_text(write_model: WriteModel) -> None:
    config = configure(write_model("llama"), skip_tokenizer_init=True)
    text = print_module(import_module(config))
    assert print_module(import_module(config)) == text == print_module(parse(text))


def test_importing_leaves_the_configuration_alone(write_model: WriteModel) -> None:
    config = configure(write_model("llama"), skip_tokenizer_init=True)
    before = str(config)
    import_module(config)
    assert str(config) == before
    assert not config.compilation_config.static_forward_context


def test_cache_type_follows_the_models_dtype(write_model: WriteModel) -> None:
    module = load(write_model("llama"), dtype="float32")
    assert {cache.format.dtype for cache in caches_of(module).values()} == {"f32"}


def test_a_rank_has_its_share(write_model: WriteModel) -> None:
    module = load(write_model("llama"), rank=1, tensor_parallel_size=2)
    assert {(s.num_heads, s.num_kv_heads) for s in signatures(module)} == {(2, 1)}
    weight = ops_of(module, ops.Linear)[0].weight
    assert (weight.type.dim, weight.type.shards, weight.type.index) == (0, 2, 1)
    assert counts(module)["all_reduce"] == 2 * LAYERS + 1


def test_qwen2_has_biases(write_model: WriteModel) -> None:
    module = load(write_model("qwen2"))  # kept: an op does not keep its module alive
    biased = [op.weight.name for op in ops_of(module, ops.Linear) if op.bias is not None]
    assert biased == [f"model.layers.{i}.self_attn.qkv_proj.weight" for i in range(LAYERS)]


def test_qwen3_normalizes_queries_and_keys_by_head(write_model: WriteModel) -> None:
    module = load(write_model("qwen3"))
    assert counts(module)["rms_norm"] == 4 * LAYERS + 1
    assert {s.head_size for s in signatures(module)} == {128}


def test_mistral_attends_to_a_window(write_model: WriteModel) -> None:
    assert [s.mask.window for s in signatures(load(write_model("mistral")))] == [128] * LAYERS


def test_gemma2_caps_scores_and_alternates_windows(write_model: WriteModel) -> None:
    module = load(write_model("gemma2"))
    assert [(s.mask.window, s.soft_cap) for s in signatures(module)] == [(128, 50.0), (0, 50.0)]
    assert ops_of(module, ops.Logits)[0].soft_cap.value == 30.0
    assert ops_of(module, ops.RMSNorm)[0].weight_offset.value == 1.0


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_other_models_of_known_layers_come_free(write_model: WriteModel, family: str) -> None:
    assert counts(load(write_model(family)))["paged_attention"] == LAYERS


def test_the_real_model(smollm2: str) -> None:
    assert {(s.num_heads, s.num_kv_heads, s.head_size) for s in signatures(load(smollm2))} == {(9, 3, 64)}
    module = load(smollm2)
    assert len(caches_of(module)) == 30


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("opt", {"OPTLearnedPositionalEmbedding": 1}),
        ("cohere", {"LayerNorm": LAYERS + 1}),
        ("jamba", {"MambaMixer": 1}),
    ],
)
def test_layers_that_llmir_does_not_know_are_opaque(
    write_model: WriteModel, family: str, kinds: dict[str, int]
) -> None:
    module = load(write_model(family))
    assert {kind.rpartition(".")[2]: count for kind, count in opaque_kinds(module).items()} == kinds
    attention = LAYERS if family != "jamba" else 1
    assert counts(module)["paged_attention"] == attention
    [remark] = [remark for remark in remarks(module) if remark.pass_name == "import"]
    assert (remark.decision, remark.numbers["opaque"]) == ("open", opaque_kinds(module))


def test_gemma3_is_known_whole(write_model: WriteModel) -> None:
    module = load(write_model("gemma3_text"))
    assert import_level(module) == "full"
    assert [s.mask.window for s in signatures(module)] == [128, 0]


def read_through_transformers(folder: str) -> tuple[int, str]:
    module = load(folder, model_impl="transformers")
    return counts(module)["paged_attention"], import_level(module)


def test_transformers_own_models_are_read_as_far_as_they_go(write_model: WriteModel) -> None:
    folder = write_model("llama", rope_parameters={"rope_type": "default"})
    # In a process of its own: vLLM changes the class, and other tests here make weights with it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_through_transformers, (folder,)) == (LAYERS, "open")


class Gate(torch.nn.Module):
    """A layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.sigmoid()


def test_a_layer_of_somebodys_own_is_opaque(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize, forward = LlamaMLP.__init__, LlamaMLP.forward

    def __init__(self: LlamaMLP, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.own = Gate()

    monkeypatch.setattr(LlamaMLP, "__init__", __init__)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.own(forward(self, x)))
    module = load(write_model("llama"))
    assert [weight.name for op in ops_of(module, Opaque) for weight in op.weights] == [
        f"model.layers.{layer}.mlp.own.scale" for layer in range(LAYERS)
    ]


@pytest.mark.parametrize(
    ("shape", "dtype", "level"),
    [
        (None, None, "full"),
        ((2, 256), None, "full"),
        ((2, 4, 64), None, "attention"),
        (None, torch.float32, "attention"),
    ],
)
def test_attention_may_be_asked_for_what_it_gives_anyway(
    write_model: WriteModel,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    level: str,
) -> None:
    def forward(self: LlamaAttention, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        asked = None if shape is None else torch.Size([q.shape[0], *shape[1:]])
        return self.o_proj(self.attn(q, k, v, asked, dtype).view(q.shape))[0]

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert import_level(load(write_model("llama"))) == level


def test_a_model_that_cannot_be_watched_has_its_attention_layers(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(write_model("llama"))

    def forward(self: LlamaAttention, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if positions.max() > 0 else self.o_proj(hidden_states)[0]

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    module = load(write_model("llama"))
    assert import_level(module) == "attention"
    assert (signatures(module), caches_of(module).keys()) == (signatures(whole), caches_of(whole).keys())
    [remark] = [remark for remark in remarks(module) if remark.pass_name == "import"]
    assert "cannot be watched" in remark.reason


def test_sinks_are_weights_of_their_layers(write_model: WriteModel) -> None:
    module = load(write_model("gpt_oss"))
    assert [(s.sinks, s.mask.window) for s in signatures(module)] == [(True, 128), (True, 0)]
    names = [op.sinks.name for op in ops_of(module, PagedAttention)]
    assert names == [f"model.layers.{n}.attn.sinks" for n in range(LAYERS)]


def test_alibi_has_a_slope_for_each_head(write_model: WriteModel) -> None:
    module = load(write_model("bloom"))
    assert all(s.alibi for s in signatures(module))
    slopes = [to_python(op.slopes) for op in ops_of(module, PagedAttention)]
    assert slopes == [[2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]] * LAYERS


def test_attention_without_a_kernel_is_refused_by_layer(write_model: WriteModel) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"head size is 42, .* \(and so has 1 more layer\)") as refusal:
        load(write_model("llama", head_dim=42))
    assert refusal.value.layer == "model.layers.0.self_attn.attn"


def test_a_model_without_attention_leaves_nothing_to_do(write_model: WriteModel) -> None:
    with pytest.raises(LlmirError, match="no attention layer, so there is nothing for llmir to do"):
        load(write_model("mamba"))
