"""What llmir's backend for GPUs does with SGLang's batches and graph hooks; CPU tensors, and a runner that records."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_fakes import CONTEXT, HEAD_SIZE, HEADS, KV_HEADS, PAGE, REQUESTS, Requests, backend, padded, plan, runner
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang import gpu_backend


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    """The backend and the requests it serves."""
    made = backend(monkeypatch)
    return made, Requests(made._req_to_token)


def call(made, batch, layer: int = 0, tokens: int | None = None, dtype: torch.dtype = torch.bfloat16, **more):
    """One layer's call for a batch, with queries, keys and values that lie in one tensor, as a model's do."""
    attention = made._layers[layer]
    tokens = len(batch.out_cache_loc) if tokens is None else tokens
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_SIZE).to(dtype)
    q, k, v = qkv.split([HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE], dim=1)
    decodes = batch.forward_mode.is_decode()
    forward = made.forward_decode if decodes else made.forward_extend
    return forward(q, k, v, attention, batch, **more)


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend._layers``: the layers of its model."""
    bind = gpu_backend.LlmirGpuBackend._bind

    def remember(self, path, layer, dtype):
        vars(self).setdefault("_layers", {})[layer.layer_id] = layer
        bind(self, path, layer, dtype)

    monkeypatch.setattr(gpu_backend.LlmirGpuBackend, "_bind", remember)


def last(made):
    return made._runners[0].steps[-1]


# ---- a step without a graph


def test_a_prefill_is_announced_with_its_new_tokens(served) -> None:
    made, requests = served
    requests.add("a", 60)
    requests.add("b", 60, like="a", prefix=32)
    requests.length["a"] = 0
    made.init_forward_metadata(requests.extend(a=40, b=5))
    assert last(made)["query_start"].tolist() == [0, 40, 45]
    assert last(made)["seq_lens"].tolist() == [40, 37]


def test_a_decode_has_one_token_a_request(served) -> None:
    made, requests = served
    requests.add("a", 60)
    requests.add("b", 60)
    requests.length.update(a=30, b=17)
    made.init_forward_metadata(requests.decode("a", "b"))
    assert last(made)["query_start"].tolist() == [0, 1, 2]
    assert last(made)["seq_lens"].tolist() == [31, 18]


def test_the_block_table_has_the_pages_of_the_slots(served) -> None:
    made, requests = served
    requests.add("a", 70)
    requests.add("b", 20)
    requests.length.update(a=64, b=3)
    batch = requests.decode("a", "b")
    made.init_forward_metadata(batch)
    assert made._block_table[0].tolist() == [int(requests.slots("a", i, i + 1)) // PAGE for i in range(0, 65, PAGE)]
    assert made._block_table[1, 0] == int(requests.slots("b", 0, 1)) // PAGE
    assert made._block_table.dtype == torch.int32


def test_lengths_come_from_the_host(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    batch.seq_lens = None  # the device's
    made.init_forward_metadata(batch)
    assert made.needs_cpu_seq_lens


def test_an_idle_step_is_nothing(served) -> None:
    made, _ = served
    made.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))
    assert made._runners[0].steps == []


def test_a_batch_of_drafts_is_refused(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    batch.spec_info = object()
    with pytest.raises(UnsupportedLayerError, match="speculative"):
        made.init_forward_metadata(batch)


# ---- a layer's call


def test_a_call_has_the_layers_tensors(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    output = call(made, batch, layer=1)
    [given] = made._runners[1].calls
    assert given["query"].shape == given["output"].shape == (40, HEADS, HEAD_SIZE)
    assert given["key"].shape == given["value"].shape == (40, KV_HEADS, HEAD_SIZE)
    assert given["cache"].data_ptr() == made.token_to_kv_pool.pages[1].data_ptr()
    assert given["block_table"] is made._block_table
    assert given["slots"].tolist() == batch.out_cache_loc.tolist()
    assert given["append_tokens"] == 40
    assert output.shape == (40, HEADS * HEAD_SIZE)
    assert (output == 7).all()


def test_what_a_model_computed_in_another_type_is_converted(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    output = call(made, batch, dtype=torch.float32)
    [given] = made._runners[0].calls
    assert {given[name].dtype for name in ("query", "key", "value", "output")} == {torch.bfloat16}
    assert output.dtype == torch.float32
    assert (output == 7).all()


def test_sinks_that_are_not_one_a_head_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend(monkeypatch, plan(sinks=True))
    requests = Requests(made._req_to_token)
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    with pytest.raises(UnsupportedLayerError, match=r"its sinks are \[1\]"):
        call(made, batch, sinks=torch.zeros(1))


def test_what_is_in_the_cache_already_is_not_appended(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    call(made, batch, save_kv_cache=False)
    assert made._runners[0].calls[0]["append_tokens"] == 0


def test_the_output_goes_where_sglang_wants_it(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    batch._attn_output = torch.zeros(40, HEADS * HEAD_SIZE, dtype=torch.bfloat16)
    assert call(made, batch).data_ptr() == batch._attn_output.data_ptr()


def test_slots_of_padding_after_the_tokens_are_left_out(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    batch.out_cache_loc = torch.nn.functional.pad(batch.out_cache_loc, (0, 24))
    call(made, batch, tokens=40)
    assert len(made._runners[0].calls[0]["slots"]) == 40


def test_more_tokens_than_were_announced_are_refused(served) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    with pytest.raises(UnsupportedLayerError, match="for 48 tokens, and 40 were announced"):
        call(made, batch, tokens=48)


@pytest.mark.parametrize("name", ["q_rope", "k_rope", "score_mod"])
def test_arguments_without_a_kernel_are_refused(served, name: str) -> None:
    made, requests = served
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    with pytest.raises(UnsupportedLayerError, match=name):
        call(made, batch, **{name: torch.zeros(1)})


def test_sinks_go_with_the_call_in_the_queries_type(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend(monkeypatch, plan(sinks=True))
    requests = Requests(made._req_to_token)
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    call(made, batch, sinks=torch.ones(HEADS))
    [given] = made._runners[0].calls
    assert given["sinks"].tolist() == [1.0] * HEADS
    assert given["sinks"].dtype == torch.bfloat16


@pytest.mark.parametrize(("planned", "sinks"), [(True, None), (False, torch.ones(HEADS))], ids=["none", "some"])
def test_sinks_unlike_the_plan_are_refused(monkeypatch: pytest.MonkeyPatch, planned, sinks) -> None:
    made = backend(monkeypatch, plan(sinks=planned))
    requests = Requests(made._req_to_token)
    requests.add("a", 60)
    batch = requests.extend(a=40)
    made.init_forward_metadata(batch)
    with pytest.raises(UnsupportedLayerError, match="sinks, unlike its plan"):
        call(made, batch, sinks=sinks)


class TestQuantizedCaches:
    @pytest.mark.parametrize(("given", "expected"), [(None, 1.0), (0.5, 0.5), (torch.tensor(0.25), 0.25)])
    def test_scales_are_the_layers_own(self, monkeypatch: pytest.MonkeyPatch, given, expected: float) -> None:
        made = plan(quantized=True)
        of = runner(made, monkeypatch)
        for layer in of.model.layers:
            layer.attn.k_scale = layer.attn.v_scale = given
        monkeypatch.setattr(gpu_backend, "GpuAttentionRunner", backend.__globals__["Recorded"])
        served = gpu_backend.LlmirGpuBackend(of)
        requests = Requests(served._req_to_token)
        requests.add("a", 60)
        batch = requests.extend(a=40)
        served.init_forward_metadata(batch)
        call(served, batch)
        [given_call] = served._runners[0].calls
        assert given_call["key_scale"].tolist() == given_call["value_scale"].tolist() == [expected]
        assert given_call["key_scale"].dtype == torch.float32
        assert given_call["cache"].dtype == torch.float8_e4m3fn

    def test_a_scale_that_is_written_again_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
        shown = gpu_backend._scale(scale, torch.device("cpu"))
        scale.fill_(3.0)
        assert shown.tolist() == [3.0]

    def test_a_cache_unlike_the_plan_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        quantized = runner(plan(quantized=True), monkeypatch)
        quantized.server_args = runner(plan(), monkeypatch).server_args
        monkeypatch.setattr(gpu_backend, "GpuAttentionRunner", backend.__globals__["Recorded"])
        with pytest.raises(UnsupportedLayerError, match=r"it has cache\.dtype f8E4M3FN, cache\.scales layer, and"):
            gpu_backend.LlmirGpuBackend(quantized)


# ---- graphs


def test_capture_prepares_a_step_of_padding(served) -> None:
    made, _ = served
    made.init_cuda_graph_state(4, 4)
    fill = made.get_cuda_graph_seq_len_fill_value()
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=4,
        spec_info=None,
        seq_lens_cpu=torch.full((4,), fill),
        req_pool_indices=torch.zeros(4, dtype=torch.int64),
        out_cache_loc=torch.zeros(4, dtype=torch.int64),
    )
    made.init_forward_metadata_out_graph(batch, in_capture=True)
    made.init_forward_metadata_in_graph(batch)
    made.on_after_cuda_graph_warmup()
    assert last(made)["query_start"].tolist() == [0, 1, 2, 3, 4]
    assert last(made)["seq_lens"].tolist() == [1] * 4
    assert last(made)["block_table"] is None
    call(made, batch)
    assert made._runners[0].calls[0]["append_tokens"] == 4


def test_a_replay_fills_the_buffers_that_were_captured(served) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 60)
    requests.length["a"] = 20
    made.init_forward_metadata_out_graph(padded(requests.decode("a"), 2))
    captured = made._block_table
    requests.add("b", 90)
    requests.length["b"] = 70
    made.init_forward_metadata_out_graph(padded(requests.decode("b"), 2))
    assert made._block_table.data_ptr() == captured.data_ptr()
    assert made._block_table.stride() == captured.stride()
    expected = [int(requests.slots("b", i, i + 1)) // PAGE for i in range(0, 71, PAGE)]
    assert captured[0, :5].tolist() == expected


def test_padding_has_one_token_in_the_spare_page(served) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 60)
    requests.length["a"] = 20
    made.init_forward_metadata_out_graph(padded(requests.decode("a"), 4))
    assert last(made)["seq_lens"].tolist() == [21, 1, 1, 1]
    assert last(made)["query_start"].tolist() == [0, 1, 2, 3, 4]
    assert made._block_table[1:, 0].tolist() == [0, 0, 0]


def test_the_graphs_table_has_room_for_the_longest_request(served) -> None:
    made, _ = served
    made.init_cuda_graph_state(4, 4)
    assert made._graph_table.shape == (4, CONTEXT // PAGE)


def test_asking_again_keeps_the_addresses(served) -> None:
    made, _ = served
    made.init_cuda_graph_state(4, 4)
    before = made._graph_table.data_ptr()
    made.init_cuda_graph_state(3, 3)
    assert made._graph_table.data_ptr() == before


def test_graphs_of_more_requests_than_there_can_be_are_refused(served) -> None:
    made, _ = served
    with pytest.raises(LlmirError, match="--cuda-graph-max-bs-decode"):
        made.init_cuda_graph_state(REQUESTS + 2, REQUESTS + 2)


def test_graphs_of_prefills_are_refused(served) -> None:
    made, requests = served
    requests.add("a", 60)
    with pytest.raises(UnsupportedFeatureError, match="EXTEND steps: give --cuda-graph-backend-prefill breakable"):
        made.init_forward_metadata_out_graph(requests.extend(a=40))


def test_a_graph_of_the_preparation_itself_is_refused(served, monkeypatch: pytest.MonkeyPatch) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 60)
    monkeypatch.setattr(made, "_is_captured", lambda: True)
    with pytest.raises(UnsupportedFeatureError, match="SGLANG_ENABLE_METADATA_GLUE_GRAPH"):
        made.init_forward_metadata_out_graph(requests.decode("a"))


def test_a_step_without_a_graph_leaves_the_graphs_table_alone(served) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 60)
    made.init_forward_metadata(requests.extend(a=40))
    assert not made._graph_table.any()


# ---- sharing, and what the whole is made for


def test_what_decoding_requests_share_is_known_from_the_second_step_on(served) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 90)
    made.init_forward_metadata(requests.extend(a=64))
    requests.add("b", 90, like="a", prefix=48)
    made.init_forward_metadata(requests.extend(b=20))
    made.init_forward_metadata_out_graph(padded(requests.decode("a", "b"), 4))
    assert last(made)["block_table"] is None
    made.init_forward_metadata_out_graph(padded(requests.decode("a", "b"), 4))
    table = last(made)["block_table"]
    assert len(table) == 4
    assert (table[0, :3] == table[1, :3]).all()
    assert (table[0, 3:] != table[1, 3:]).all()
    assert len(set(table[1:, 3].tolist())) == 3, "padding shares nothing"


def test_a_replay_that_does_not_say_whose_it_is_shares_nothing(served, caplog: pytest.LogCaptureFixture) -> None:
    made, requests = served
    made.init_cuda_graph_state(4, 4)
    requests.add("a", 90)
    requests.length["a"] = 64
    batch = padded(requests.decode("a"), 4)
    del batch.rids
    with caplog.at_level(logging.WARNING, "sglang.llmir"):
        made.init_forward_metadata_out_graph(batch)
    assert last(made)["block_table"] is None
    assert "requests read their prefixes by themselves" in caplog.text


def test_a_plan_that_shares_nothing_copies_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = plan()
    [kernel] = shares.kernels
    alone = replace(shares, kernels=(replace(kernel, policy=replace(kernel.policy, sharing=None)),))
    made = backend(monkeypatch, alone)
    assert made._host_table is None
    requests = Requests(made._req_to_token)
    for name in "ab":
        requests.add(name, 90)
    made.init_forward_metadata(requests.extend(a=64, b=64))
    made.init_forward_metadata(requests.decode("a", "b"))
    assert last(made)["block_table"] is None


def test_limits_are_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend(monkeypatch)
    assert made._runners[0].limits == gpu_backend.StepLimits(requests=REQUESTS + 1, tokens=512 + REQUESTS + 1)


def test_without_chunks_a_prompt_may_have_the_whole_context(monkeypatch: pytest.MonkeyPatch) -> None:
    of = runner(plan(), monkeypatch)
    schedule = SimpleNamespace(chunked_prefill_size=-1, max_prefill_tokens=64)
    monkeypatch.setattr(gpu_backend, "get_schedule", lambda: schedule)
    monkeypatch.setattr(gpu_backend, "max_prefill_buffer_tokens", lambda: 0)
    assert gpu_backend.step_limits(of).tokens == CONTEXT + REQUESTS + 1


def test_batches_may_be_prepared_by_triton_kernels(served) -> None:
    made, _ = served
    assert made.support_triton()


def test_models_find_the_pools(served) -> None:
    made, _ = served
    assert made.token_to_kv_pool.page_size == PAGE
    assert made.req_to_token_pool.size == REQUESTS
