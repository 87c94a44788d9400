"""Plans in vLLM's configuration: made in a child process, kept on disk, the same at every start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import no_child
from tiny_models import LAYERS, WriteModel
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from llmir import compiler
from llmir.errors import LlmirError, PlanError, UnsupportedLayerError
from llmir.frontends.common import planning as common
from llmir.frontends.common.options import Options
from llmir.frontends.common.plan_cache import plan_key
from llmir.frontends.vllm import planning, plugin
from llmir.frontends.vllm.importer import import_module
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.workload import DEFAULT


def engine_config(folder: str, **engine_args: Any) -> VllmConfig:
    plugin.register()
    arguments = {"skip_tokenizer_init": True, "max_model_len": 256, **engine_args}
    return EngineArgs(model=folder, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the tiny Llama with blocks of 64 tokens, compiled in this process."""
    import json

    from tiny_models import FAMILIES

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **FAMILIES["llama"]}))
    config = engine_config(str(folder), block_size=64)
    options = compiler.Options(calibrate=False, cache=tmp_path_factory.mktemp("cache"))
    made = compiler.compile(import_module(config), Target.detect(), DEFAULT, options)
    return Plan.loads(made.dumps())  # as it comes from a child or a file: lists where it had tuples


def test_a_child_makes_the_plan_and_the_next_start_reads_it(
    write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model("llama")
    first = engine_config(folder, attention_backend="LLMIR")
    made = Plan.from_json(first.additional_config[planning.PLAN_KEY])
    assert first.cache_config.block_size == made.block_size
    assert [layer for kernel in made.kernels for layer in kernel.layers] == [
        f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)
    ]
    monkeypatch.setattr(common.subprocess, "run", no_child)
    second = engine_config(folder, attention_backend="CUSTOM")
    assert second.additional_config == first.additional_config
    third = engine_config(folder, attention_backend="LLMIR")
    assert third.compute_hash() == first.compute_hash()


def test_an_error_of_the_child_is_the_same_error_here(write_model: WriteModel, cache: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="head size is 24") as refusal:
        engine_config(write_model("llama", head_dim=24), attention_backend="LLMIR")
    assert refusal.value.layer == "model.layers.0.self_attn.attn"


def test_a_model_with_states_beside_its_cache_is_refused_before_a_plan_is_made(
    write_model: WriteModel, cache: Path
) -> None:
    with pytest.raises(LlmirError, match="keeps states beside its KV cache"):
        engine_config(write_model("jamba"), attention_backend="LLMIR")


def test_a_child_that_dies_is_an_error(write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.sys, "executable", "/bin/false")
    with pytest.raises(common.PlanningError, match="status 1"):
        engine_config(write_model("llama"), attention_backend="LLMIR")


@pytest.fixture
def made(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Lets the child process answer with ``plan`` at once; the list has an entry for each time it is asked."""
    asked: list[Options] = []

    def child(module: str, payload: tuple[VllmConfig, Options]) -> Plan:
        asked.append(payload[1])
        return plan

    monkeypatch.setattr(common, "plan_in_child", child)
    return asked


def test_the_users_block_size_wins(write_model: WriteModel, cache: Path, made: list[Options], plan: Plan) -> None:
    assert engine_config(write_model("llama"), attention_backend="LLMIR", block_size=64).cache_config.block_size == 64
    [decision] = [d for d in plan.decisions if d.subject == "KV cache"]
    assert "llmir would have chosen" in decision.reason
    assert decision.alternatives
    with pytest.raises(PlanError, match="64 tokens, and --block-size says 128"):
        engine_config(write_model("llama"), attention_backend="LLMIR", block_size=128)


def test_the_plan_sets_the_block_size(write_model: WriteModel, cache: Path, made: list[Options]) -> None:
    assert engine_config(write_model("llama"), attention_backend="LLMIR").cache_config.block_size == 64


def test_a_plan_in_the_configuration_is_kept(write_model: WriteModel, cache: Path, made: list[Options]) -> None:
    config = engine_config(write_model("llama"), attention_backend="LLMIR")
    config.__post_init__()  # as an engine process does after its handshake
    assert len(made) == 1
    assert config.cache_config.block_size == 64


def test_a_plan_of_another_machine_in_the_configuration_is_refused(write_model: WriteModel, plan: Plan) -> None:
    """A configuration may come from a file, or from a node with another processor."""
    foreign = replace(plan, target_fingerprint=f"riscv64-{Target.detect().isa}").to_json()
    with pytest.raises(PlanError, match="made for a machine riscv64"):
        engine_config(write_model("llama"), attention_backend="LLMIR", additional_config={planning.PLAN_KEY: foreign})


def test_the_users_additional_config_is_not_written_to(
    write_model: WriteModel, cache: Path, made: list[Options]
) -> None:
    mine = {"llmir": {"workload": "chat"}}
    engine_config(write_model("llama"), attention_backend="LLMIR", additional_config=mine)
    assert mine == {"llmir": {"workload": "chat"}}
    assert made == [Options(workload="chat")]


def test_measurements_do_not_reach_vllms_compile_cache(
    write_model: WriteModel, cache: Path, made: list[Options], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model("llama")
    first = engine_config(folder, attention_backend="LLMIR")
    otherwise = replace(plan, decisions=(), target={**plan.target, "measured": {"read_bandwidth": 1.0}})
    monkeypatch.setattr(common, "plan_in_child", lambda *_: otherwise)
    monkeypatch.setenv("LLMIR_CACHE", str(cache / "another"))
    assert engine_config(folder, attention_backend="LLMIR").compute_hash() == first.compute_hash()


def test_a_plan_file_is_served_as_it_is(write_model: WriteModel, cache: Path, plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    folder = write_model("llama")
    replace(plan, model=folder).write(file)
    asked = {"llmir": {"plan": str(file)}}
    config = engine_config(folder, attention_backend="LLMIR", additional_config=asked)
    assert config.additional_config[planning.PLAN_KEY]["block_size"] == 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "another"}, "made for model 'another'"),
        ({"world_size": 2}, "made for tensor-parallel size 2"),
        ({"framework_version": "0.1"}, "made for framework 'vllm 0.1'"),
        ({"target_fingerprint": f"riscv64-{Target.detect().isa}"}, "made for a machine riscv64"),
    ],
)
def test_a_plan_file_for_something_else_is_refused(
    write_model: WriteModel, plan: Plan, tmp_path: Path, change: dict, reason: str
) -> None:
    file = tmp_path / "plan.json"
    folder = write_model("llama")
    replace(plan, **{"model": folder, **change}).write(file)
    asked = {"llmir": {"plan": str(file)}}
    with pytest.raises(PlanError, match=reason):
        engine_config(folder, attention_backend="LLMIR", additional_config=asked)


@pytest.mark.parametrize("content", [None, "", "{", '{"format": 99}', "[]"])
def test_an_unreadable_plan_file_is_refused(write_model: WriteModel, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PlanError):
        engine_config(write_model("llama"), attention_backend="LLMIR", additional_config={"llmir": {"plan": str(file)}})


def test_a_target_this_machine_cannot_run_is_refused(
    write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "runs_on", lambda self, host: False)
    with pytest.raises(LlmirError, match="cannot run kernels for target 'cpu:avx512'"):
        engine_config(
            write_model("llama"), attention_backend="LLMIR", additional_config={"llmir": {"target": "cpu:avx512"}}
        )


def test_everything_that_decides_a_plan_is_in_its_key(write_model: WriteModel, tmp_path: Path) -> None:
    folder, target = write_model("llama"), Target.detect()
    workload = tmp_path / "workload.json"
    workload.write_text("[]")

    def key(target: Target = target, options: Options | None = None, **engine_args: Any) -> str:
        return plan_key(planning.facts(engine_config(folder, **engine_args), target.isa), options or Options(), target)

    keys = [
        key(),
        key(dtype="float32"),
        key(block_size=64),
        key(max_model_len=512),
        key(tensor_parallel_size=2),
        key(hf_overrides={"rope_theta": 5.0}),
        key(options=Options(workload="chat")),
        key(options=Options(workload=str(workload))),
        key(options=Options(prefix_sharing="off")),
        key(target=Target.named("cpu:avx2")),
    ]
    workload.write_text("[ ]")
    keys.append(key(options=Options(workload=str(workload))))
    assert len(set(keys)) == len(keys)
    assert key() == key(max_num_seqs=7) == keys[0]


def test_everything_that_decides_which_classes_are_built_is_in_a_plan_s_key(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = write_model("llama"), Target.detect()

    def key(**engine_args: Any) -> str:
        return plan_key(planning.facts(engine_config(folder, **engine_args), target.isa), Options(), target)

    keys = [
        key(),
        key(model_impl="transformers"),
        key(enable_lora=True),
        key(trust_remote_code=True),
        key(code_revision="another"),
        key(disable_sliding_window=True),
    ]
    monkeypatch.setenv("VLLM_MOE_DP_CHUNK_SIZE", "7")
    (Path(folder) / "modeling_own.py").write_text("class Own: ...")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]
