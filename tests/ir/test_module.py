from dataclasses import replace

import pytest
from small_models import INFO, LAYER, attention_module, cache_type

from llmir.ir.attention import PagedAttention
from llmir.ir.module import (
    STEP_INPUTS,
    ModelInfo,
    caches_of,
    decoder,
    decoder_of,
    model_info,
    new_module,
    ops_of,
    reformat_caches,
)
from llmir.ir.text import parse, print_module, verify


def test_model_info_survives_text():
    info = ModelInfo("sglang 1.0", "org/model", 1, 2, True, (32, 64))
    assert model_info(parse(print_module(new_module(info)))) == info


def test_info_of_a_foreign_module_names_what_it_lacks():
    with pytest.raises(KeyError, match="framework"):
        model_info(parse("module {}"))


def test_decoder_has_the_step_inputs_by_name():
    module = attention_module()
    function = decoder_of(module)
    names = [labels["llm.name"].value for labels in function.arg_attrs if "llm.name" in labels]
    assert names == [name for name, _, _ in STEP_INPUTS] + ["x", "key", "value"]


def test_a_module_without_decoder_says_so():
    with pytest.raises(KeyError, match="no function @decoder"):
        decoder_of(new_module(INFO))


def test_a_decoder_without_output_is_refused():
    with pytest.raises(ValueError, match=r"without output"), decoder(new_module(INFO)):
        pass


def test_an_error_while_building_is_not_hidden():
    with pytest.raises(ZeroDivisionError), decoder(new_module(INFO)):
        _ = 1 / 0


def test_caches_are_found_by_layer():
    assert caches_of(attention_module(layers=2)) == {LAYER.format(n): cache_type() for n in (0, 1)}


def test_ops_come_in_program_order():
    module = attention_module(layers=3)
    layers = [op.layer.value for op in ops_of(module, PagedAttention)]
    assert layers == [LAYER.format(n) for n in range(3)]


def test_retyped_caches_change_everywhere():
    module = attention_module(layers=2)
    reformat_caches(module, lambda layer, cache: replace(cache, block_size=32, layout="lane"))
    verify(module)
    assert "block_size = 128" not in print_module(module)
    assert {cache.format.layout for cache in caches_of(module).values()} == {"lane"}


def test_caches_can_be_retyped_one_layer_at_a_time():
    module = attention_module(layers=2)
    sizes = {LAYER.format(0): 32, LAYER.format(1): 64}
    reformat_caches(module, lambda layer, cache: replace(cache, block_size=sizes[layer]))
    verify(parse(print_module(module)))
    assert {layer: cache.format.block_size for layer, cache in caches_of(module).items()} == sizes
