import pytest
from small_models import attention_module, fused_module, kernel_spec, llama_layer

from llmir.errors import LlmirError
from llmir.ir.bindings import ir
from llmir.ir.text import InvalidModuleError, bytecode, parse, print_module, read, verify

MODULES = {
    "attention": attention_module,
    "llama": llama_layer,
    "fused": lambda: fused_module(kernel=kernel_spec().symbol, spec=kernel_spec()),
}


@pytest.mark.parametrize("name", MODULES)
def test_text_parses_to_the_same_text(name):
    text = print_module(MODULES[name]())
    assert print_module(parse(text)) == text


@pytest.mark.parametrize("name", MODULES)
def test_bytecode_reads_back_to_the_same_text(name):
    module = MODULES[name]()
    assert print_module(parse(bytecode(module))) == print_module(module)


def test_bytecode_keeps_locations():
    module = attention_module()
    assert print_module(parse(bytecode(module)), locations=True) == print_module(module, locations=True)
    assert 'loc("model.layers.0.self_attn.attn")' in print_module(module, locations=True)


def test_parsing_without_a_context_makes_one():
    text = print_module(attention_module())
    assert parse(text).context != ir.Context.current


def test_syntax_error_says_where():
    with pytest.raises(InvalidModuleError, match=r"not a valid llm module: -:2:3: custom op 'nothing'"):
        parse("module {\n  nothing\n}")


def test_unknown_op_says_where():
    with pytest.raises(InvalidModuleError, match=r"-:2:3: unregistered operation 'llm.nope'"):
        parse('module {\n  "llm.nope"() : () -> ()\n}')


def test_built_module_names_the_layer_in_errors():
    module = attention_module(scale=-1.0)
    with pytest.raises(InvalidModuleError, match=r"model.layers.0.self_attn.attn: .*scale must be positive"):
        verify(module)


@pytest.mark.parametrize("write", ["text", "bytecode"])
def test_read_takes_text_and_bytecode(tmp_path, write):
    module = attention_module()
    file = tmp_path / "decoder.mlir"
    file.write_bytes(bytecode(module) if write == "bytecode" else print_module(module).encode())
    assert print_module(read(file)) == print_module(module)


@pytest.mark.parametrize("content", [b"module @", b"\xff\xfe\xfd", b"ML\xefR truncated", b"module {"])
def test_unreadable_file_is_named(tmp_path, content):
    file = tmp_path / "decoder.mlir"
    file.write_bytes(content)
    with pytest.raises(LlmirError, match=r"decoder\.mlir"):
        read(file)


def test_truncated_bytecode_is_refused():
    whole = bytecode(attention_module())
    with pytest.raises(InvalidModuleError):
        parse(whole[: len(whole) // 2])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidModuleError, match=r"cannot read module .*nowhere\.mlir: No such file"):
        read(tmp_path / "nowhere.mlir")
