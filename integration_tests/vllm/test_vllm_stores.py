"""Every option of this vLLM that has to do with the KV cache is one that somebody judged."""

import dataclasses
import re
from typing import Any

import pytest
from tiny_models import WriteModel
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from llmir.errors import LlmirError
from llmir.frontends.vllm import plugin, stores

#: What options are called that have to do with the KV cache, and with who else may hold it.
ABOUT_CACHES = re.compile(
    r"kv|cache|offload|transfer|connector|disagg|store|sparse|host|mooncake|sleep|swap", re.IGNORECASE
)
OPTIONS = {field.name: field.default for field in dataclasses.fields(EngineArgs)}


def test_every_option_about_caches_is_judged_once() -> None:
    found = {name for name in OPTIONS if ABOUT_CACHES.search(name)}
    assert found - set(stores.REFUSED) - stores.HARMLESS == set(), "judge these in llmir/frontends/vllm/stores.py"
    assert not set(stores.REFUSED) & stores.HARMLESS


def test_nothing_is_judged_that_there_is_not() -> None:
    assert set(stores.REFUSED) | stores.HARMLESS <= set(OPTIONS)


@pytest.mark.parametrize("name", sorted(stores.REFUSED))
def test_what_is_served_is_what_vllm_does_by_itself(name: str) -> None:
    assert OPTIONS[name] == stores.REFUSED[name][1]


@pytest.mark.parametrize(
    "engine_args",
    [
        {"kv_offloading_size": 1.0},
        {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        {"kv_transfer_config": KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")},
    ],
    ids=["offloading", "lmcache", "transfer"],
)
def test_what_hands_the_cache_out_is_refused_by_name(write_model: WriteModel, engine_args: dict[str, Any]) -> None:
    plugin.register()
    arguments = EngineArgs(
        model=write_model("llama"), skip_tokenizer_init=True, attention_backend="LLMIR", **engine_args
    )
    name = next(iter(engine_args)).replace("_", "-")
    with pytest.raises(LlmirError, match=f"--{name} .* does not know llmir's cache layout"):
        arguments.create_engine_config()
